"""Benchmarks: what a rank measures; ``longctx bench`` starts the processes and prints the tables."""
