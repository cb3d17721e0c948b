"""Brings sequence parallelism into the model libraries of others; each is imported where it is used."""
