"""Attention of sequences that are being generated: a sharded cache, and tree decoding over it."""
