"""Softmax attention over sequences that are sharded over ranks, by one of several strategies.

Each strategy is one file of ``strategies``. Kernels compute tiles on one device; partial results merge by log-sum-exp.
"""

from longctx.attention.core import CoreAttention, StrategyAttention
from longctx.attention.reference import dense_attention
from longctx.attention.runtime.registry import (
    AttentionCase,
    Strategy,
    get_strategy,
    inner_of,
    refusal,
    require,
    settled,
)
from longctx.options import StrategyOptions

__all__ = [
    "AttentionCase",
    "CoreAttention",
    "Strategy",
    "StrategyAttention",
    "StrategyOptions",
    "dense_attention",
    "get_strategy",
    "inner_of",
    "refusal",
    "require",
    "settled",
]
