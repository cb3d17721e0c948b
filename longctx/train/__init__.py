"""Trains a model: the loop, the optimizer step, the optimizer, batches read ahead, and the start-up canary."""
