"""Turns text into token files: what a tokenizer's files say, worker processes, resuming, and the summary."""
