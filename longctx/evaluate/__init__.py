"""Generates text with a trained model; keys and values of the prompts are sharded over ranks."""

from longctx.evaluate.generate import Generated, Sampling, SequenceSharding, generate
from longctx.evaluate.session import DecodingSession

__all__ = ["DecodingSession", "Generated", "Sampling", "SequenceSharding", "generate"]
