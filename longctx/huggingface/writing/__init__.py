"""Writes models of Hugging Face: configuration, weights, and what a run keeps of the directory that it began with."""
