"""Local attention: the sequence lies whole on one rank; one kernel call, no communication."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy
from longctx.errors import ConfigError


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the whole sequence. q ``[B, T, H/TP, D]``, k and v ``[B, T, Hkv/TP, D]``."""
    if context.group.size != 1:
        raise ConfigError(f"local attention computes whole sequences, and {context.group.size} ranks share this one")
    partial = Partial(q)
    context.kernel.forward(q, k, v, context.plan.tiles(0, 0), context.scale, partial)
    return partial.out, partial.lse


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    grads = (
        torch.zeros_like(q, dtype=dtype),
        torch.zeros_like(k, dtype=dtype),
        torch.zeros_like(v, dtype=dtype),
    )
    context.kernel.backward(dout, q, k, v, out, lse, context.plan.tiles(0, 0), context.scale, grads)
    return grads


LOCAL = Strategy(
    "local",
    define_strategy("local", forward, backward, tail=True),
    layout="contiguous",
    one_rank=True,
    half=True,
    costs="longctx.attention.costs.local:COSTS",
)
