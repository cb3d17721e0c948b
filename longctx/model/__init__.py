"""Defines a single-device decoder that knows nothing of ranks: attention and sharding come from outside."""

from longctx.model.block import Block, SoftmaxBlock
from longctx.model.decoder import Decoder, Part, Vocabulary
from longctx.model.flops import LayerFlops
from longctx.model.initialize import initialize
from longctx.model.linear_block import LinearBlock
from longctx.model.loss import cross_entropy_sum

__all__ = [
    "Block",
    "Decoder",
    "LayerFlops",
    "LinearBlock",
    "Part",
    "SoftmaxBlock",
    "Vocabulary",
    "cross_entropy_sum",
    "initialize",
]
