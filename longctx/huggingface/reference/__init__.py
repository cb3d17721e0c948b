"""Computes what ours is compared with: the model of ``transformers``, in any dtype, on tokens of its own."""
