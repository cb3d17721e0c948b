"""Checkpoints: sharded, hashed, committed by one rename, readable on any mesh."""
