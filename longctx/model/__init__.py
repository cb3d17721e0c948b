"""A single-device decoder. It knows nothing of ranks: attention is handed to it, sharding is applied to it."""

from longctx.model.block import Block
from longctx.model.decoder import Decoder
from longctx.model.initialize import initialize
from longctx.model.loss import cross_entropy_sum

__all__ = ["Block", "Decoder", "cross_entropy_sum", "initialize"]
