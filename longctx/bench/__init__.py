"""Measures attention strategies, and the step of a configuration, on the user's own mesh: ``longctx bench``."""
