"""Reads corpora as other programs write them: a file for each format, and what they share."""
