"""Core-attention disaggregation: ranks compute attention for one another.

In place, ping-pong, or across pipeline stages.
"""
