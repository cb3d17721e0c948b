"""Ring attention: blocks of keys and values rotate around the ranks, queries stay.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023); Brandon et al.,
"Striped Attention: Faster Ring Attention for Causal Transformers" (2023). The zigzag form is that of Llama 3 and
zhuzilin/ring-flash-attention. They differ in the layout alone, hence in the plan's tiles and schedule. This loop is the
same for all of them, and for one rank.

    forward:                                   backward:
    for hop = 0 .. P-1:                        for hop = 0 .. P-1:
        send the block on, receive the next        send the block on, receive the next
        partial = merge(partial, q over block)     dq += ...; (dk, dv) of the block = ...
        wait for the next block                    send (dk, dv) on behind the block, or to its owner

A block shrinks to the rows that some later rank reads, and stops at its last reader. From there its gradients, in
the accumulation dtype, return to its owner (``longctx.sequence.ring_schedule``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Strategy
from longctx.attention.runtime.ring_transport import GradientReturn, rotate_blocks, zeros
from longctx.sequence import RingSchedule, key_ring


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries; q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``."""
    return pass_keys(q, k, v, context, key_ring(context.plan))


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v.

    Given the global lse, each block's share is independent of the others.
    """
    return pass_keys_backward(dout, saved, context, key_ring(context.plan))


def pass_keys(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, schedule: RingSchedule
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries, rotating blocks of (k, v) under ``schedule``."""
    partial, me = Partial(q), context.group.rank
    for hop, rows, [(block_k, block_v)] in rotate_blocks((_block(k, v, schedule, me),), schedule, context.group):
        tiles = context.plan.packed_tiles(me, schedule.owner(me, hop), rows)
        context.kernel.forward(q, block_k, block_v, tiles, context.scale, partial)
        del block_k, block_v  # or they would still be here when the next block but one is posted
    return partial.out, partial.lse


def pass_keys_backward(
    dout: Tensor, saved: Saved, context: AttentionContext, schedule: RingSchedule
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v, rotating blocks of (k, v) under ``schedule``."""
    q, k, v, out, lse = saved
    dtype, me = accumulation_dtype(q.dtype), context.group.rank
    direct_dtype = k.dtype if context.options.grad_dtype == "compute" else None
    dq = zeros(q, dtype)
    gradients = GradientReturn((zeros(k, dtype), zeros(v, dtype)), schedule, context.group, direct_dtype)
    for hop, rows, [(block_k, block_v)] in rotate_blocks((_block(k, v, schedule, me),), schedule, context.group):
        tiles = context.plan.packed_tiles(me, schedule.owner(me, hop), rows)
        dk, dv = gradients.buffer(hop, rows)
        context.kernel.backward(dout, q, block_k, block_v, out, lse, tiles, context.scale, (dq, dk, dv))
        gradients.send(hop)
        del block_k, block_v, dk, dv
    dk, dv = gradients.finish()
    return dq, dk, dv


def _block(k: Tensor, v: Tensor, schedule: RingSchedule, rank: int) -> Tensor:
    """The rank's block of keys and values, ``[2, B, rows, Hkv/TP, D]``."""
    rows = schedule.carried(rank, 0)
    return torch.stack((rows.take(k), rows.take(v)))


def _refuses_striped(case: AttentionCase) -> str | None:
    if case.layout != "striped":
        return f"layout {case.layout!r}: it is the ring over the striped layout; use attention.layout=striped, or ring"
    return None


RING = Strategy(
    "ring",
    define_strategy("ring", forward, backward, tail=True),
    options=frozenset({"grad_dtype"}),
    half=True,
    costs="longctx.attention.costs.ring:COSTS",
)
STRIPED = replace(RING, name="striped", layout="striped", refuses=_refuses_striped)
