"""Knows what people write for Hydra: its groups and their files, overrides, and the flags of its command line."""
