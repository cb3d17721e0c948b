"""Estimates of what strategies send and keep in memory, made from a plan without running anything."""
