"""Mixes sources: how their documents are one corpus, and which of them is read when."""
