"""Runs ``longctx generate``: where its model and tokenizer come from, and its ranks."""
