"""Generates text with a trained model; keys and values of the prompts are sharded over ranks."""

from longctx.evaluate.generate import Generated, Sampling, SequenceSharding, generate
from longctx.evaluate.session import DecodingSession, require_remembered
from longctx.evaluate.stages import StagedModel

__all__ = [
    "DecodingSession", "Generated", "Sampling", "SequenceSharding", "StagedModel", "generate", "require_remembered",
]  # fmt: skip
