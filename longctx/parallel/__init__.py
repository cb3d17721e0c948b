"""How a single-device decoder is spread over a mesh."""

from longctx.parallel.apply import parallelize

__all__ = ["parallelize"]
