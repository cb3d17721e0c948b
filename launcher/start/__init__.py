"""Starts a run: what is checked while its directory is held, and what it tells before its first step."""
