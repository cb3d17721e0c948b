"""Attention of sequences that are being generated: a sharded key/value cache, and tree decoding over it."""
