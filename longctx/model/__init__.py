"""A single-device decoder that knows nothing of ranks: attention and sharding come from outside."""

from longctx.model.block import Block
from longctx.model.decoder import Decoder, Part, Vocabulary
from longctx.model.initialize import initialize
from longctx.model.loss import cross_entropy_sum

__all__ = ["Block", "Decoder", "Part", "Vocabulary", "cross_entropy_sum", "initialize"]
