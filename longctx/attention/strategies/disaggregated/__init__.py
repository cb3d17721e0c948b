"""Core-attention disaggregation: ranks serve tasks to one another, in place, ping-pong, or across pipeline stages."""
