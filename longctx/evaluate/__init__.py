"""What a trained model does: text generated from prompts whose keys and values are sharded over ranks."""

from longctx.evaluate.generate import Generated, Sampling, SequenceSharding, generate
from longctx.evaluate.session import DecodingSession

__all__ = ["DecodingSession", "Generated", "Sampling", "SequenceSharding", "generate"]
