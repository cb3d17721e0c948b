"""What a trained model does: text generated from prompts whose keys and values are sharded over ranks."""

from longctx.evaluate.generate import Generated, Ranks, Sampling, generate
from longctx.evaluate.session import Session

__all__ = ["Generated", "Ranks", "Sampling", "Session", "generate"]
