"""Attention over a sharded sequence: one file per strategy, kernels by contract, merged by log-sum-exp."""

from longctx.attention.core import CoreAttention, StrategyAttention
from longctx.attention.operator import Options
from longctx.attention.reference import dense_attention
from longctx.attention.registry import AttentionCase, Strategy, get_strategy, inner_of, refusal, require

__all__ = [
    "AttentionCase",
    "CoreAttention",
    "Options",
    "Strategy",
    "StrategyAttention",
    "dense_attention",
    "get_strategy",
    "inner_of",
    "refusal",
    "require",
]
