"""Saves and restores runs: checkpoints are sharded, hashed, committed by one rename, and readable on any mesh."""
