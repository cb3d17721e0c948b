"""Attention of a sequence that lies whole on one rank: one kernel call, no communication."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_operator
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Peak, Sizes, Strategy, Volume
from longctx.errors import ConfigError
from longctx.sequence import SequencePlan


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T, H/TP, D]``, k and v ``[B, T, Hkv/TP, D]`` to (out, lse)."""
    if call.group.size != 1:
        raise ConfigError(f"local attention computes whole sequences, and {call.group.size} ranks share this one")
    partial = Partial(q)
    call.kernel.forward(q, k, v, call.plan.tiles(0, 0), call.scale, partial)
    return partial.out, partial.lse


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    grads = (
        torch.zeros_like(q, dtype=dtype),
        torch.zeros_like(k, dtype=dtype),
        torch.zeros_like(v, dtype=dtype),
    )
    call.kernel.backward(dout, q, k, v, out, lse, call.plan.tiles(0, 0), call.scale, grads)
    return grads


def _refuses(case: AttentionCase) -> str | None:
    if case.world != 1:
        return f"{case.world} ranks share the sequence; it computes on one: set parallel.sp=1, or attention=ring"
    return None


def _volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    return Volume(0, 0, 0, 0)


def _peak(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Out as it is summed and as it is returned, lse; backward the gradients likewise."""
    rows = plan.shard
    return Peak(
        rows * sizes.held(queries=1, outputs=1, sums=1),
        rows * sizes.held(queries=2, outputs=1, sums=1, keys=1, gradients=1),
    )


def alive(plan: SequencePlan, sizes: Sizes) -> Peak:
    """What each pass makes: results as they are summed."""
    return Peak(plan.shard * sizes.held(outputs=1, sums=1), plan.shard * sizes.held(outputs=1, gradients=1))


attend = define_operator("local", forward, backward, tail=True)

STRATEGIES = {"local": Strategy("local", attend, "contiguous", _refuses, _volume, _peak, tail=True)}
