"""Ring attention: key/value blocks go round, queries stay.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023);
Brandon et al., "Striped Attention: Faster Ring Attention for Causal Transformers" (2023). The zigzag form
is that of Llama 3 and zhuzilin/ring-flash-attention. They differ in the layout alone, hence in the plan's
tiles and rotation; this loop is the same for all of them, and for one rank.

    for hop = 0 .. P-1:                        for hop = 0 .. P-1:
        pass my block on, expect the next          pass my block on, expect the next
        merge attention of q over my block         dq += ..., dk, dv of my block += ...
        take the block that arrived                send dk, dv after their block, or home

A block is narrowed to the rows that some later rank reads and stops after its last reader; its gradients,
in the accumulation dtype, go home from there (``longctx.sequence.ring_schedule``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Strategy
from longctx.attention.runtime.ring_transport import GradientReturn, travel, zeros
from longctx.sequence import RingSchedule, key_ring


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    return pass_keys(q, k, v, call, key_ring(call.plan))


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v. Given the global lse, each block's share is independent of the others."""
    return pass_keys_backward(dout, saved, call, key_ring(call.plan))


def pass_keys(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext, rotation: RingSchedule) -> tuple[Tensor, Tensor]:
    partial, me = Partial(q), call.group.rank
    for hop, rows, [block] in travel((_keys(k, v, rotation, me),), rotation, call.group):
        tiles = call.plan.packed_tiles(me, rotation.owner(me, hop), rows)
        call.kernel.forward(q, block[0], block[1], tiles, call.scale, partial)
        del block  # or it would still be here when the next but one is posted
    return partial.out, partial.lse


def pass_keys_backward(
    dout: Tensor, saved: Saved, call: AttentionContext, rotation: RingSchedule
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    dtype, me = accumulation_dtype(q.dtype), call.group.rank
    direct_dtype = k.dtype if call.options.grad_dtype == "compute" else None
    dq = zeros(q, dtype)
    gradients = GradientReturn((zeros(k, dtype), zeros(v, dtype)), rotation, call.group, direct_dtype)
    for hop, rows, [block] in travel((_keys(k, v, rotation, me),), rotation, call.group):
        tiles = call.plan.packed_tiles(me, rotation.owner(me, hop), rows)
        dk, dv = gradients.buffer(hop, rows)
        call.kernel.backward(dout, q, block[0], block[1], out, lse, tiles, call.scale, (dq, dk, dv))
        gradients.send(hop)
        del block, dk, dv
    dk, dv = gradients.finish()
    return dq, dk, dv


def _keys(k: Tensor, v: Tensor, rotation: RingSchedule, rank: int) -> Tensor:
    """The rank's block of keys and values, ``[2, B, rows, Hkv/TP, D]``."""
    rows = rotation.carried(rank, 0)
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
