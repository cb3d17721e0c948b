"""What strategies send and keep in memory, estimated from a plan without running them."""
