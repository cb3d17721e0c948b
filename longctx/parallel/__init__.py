"""Spreads a single-device decoder over a mesh."""

from longctx.parallel.apply import parallelize

__all__ = ["parallelize"]
