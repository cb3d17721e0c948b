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

from dataclasses import astuple

import torch
from torch import Tensor

from longctx.attention.costs.memory import alive_on_way, blocks_alive
from longctx.attention.runtime.operator import AttentionContext, Saved, define_operator
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Peak, Sent, Sizes, Strategy, Volume, summed
from longctx.attention.runtime.ring_transport import GradientReturn, travel, zeros
from longctx.sequence import RingSchedule, SequencePlan


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    return pass_keys(q, k, v, call, call.plan.rotation)


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v. Given the global lse, each block's share is independent of the others."""
    return pass_keys_backward(dout, saved, call, call.plan.rotation)


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
    straight = k.dtype if call.options.travel == "narrow" else None
    dq = zeros(q, dtype)
    homeward = GradientReturn((zeros(k, dtype), zeros(v, dtype)), rotation, call.group, straight)
    for hop, rows, [block] in travel((_keys(k, v, rotation, me),), rotation, call.group):
        tiles = call.plan.packed_tiles(me, rotation.owner(me, hop), rows)
        dk, dv = homeward.room(hop, rows)
        call.kernel.backward(dout, q, block[0], block[1], out, lse, tiles, call.scale, (dq, dk, dv))
        homeward.settle(hop)
        del block, dk, dv
    dk, dv = homeward.finish()
    return dq, dk, dv


def _keys(k: Tensor, v: Tensor, rotation: RingSchedule, rank: int) -> Tensor:
    """The rank's block of keys and values, ``[2, B, rows, Hkv/TP, D]``."""
    rows = rotation.carried(rank, 0)
    return torch.stack((rows.take(k), rows.take(v)))


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Keys and values of the rows that a rank passes on, in the backward pass once more, and dk and dv of every row
    it has held for others, passed on, sent home, or both.
    """
    rotation, straight = plan.rotation, sizes.options.travel == "narrow"
    block, gradients = 2 * sizes.keys, 2 * (sizes.keys if straight else sizes.key_gradients)
    passed = [(to, len(rows) * block) for to, rows in rotation.leaving(rank)]
    returned = [(to, len(rows) * gradients) for to, rows in rotation.returning(rank, straight)]
    return [
        *((to, Volume(size, size, 1, 1)) for to, size in passed),
        *((to, Volume(0, size, 0, 1)) for to, size in returned),
    ]


def peak(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Of keys around the plan's ring."""
    return keys_peak(plan, plan.rotation, sizes)


def keys_peak(plan: SequencePlan, rotation: RingSchedule, sizes: Sizes) -> Peak:
    """Of the passes, or results in their own dtype beside those in which they were summed; backward what was saved."""
    rows, passes = plan.shard, keys_alive(plan, rotation, sizes)
    return Peak(
        max(passes.forward, rows * sizes.held(queries=1, outputs=1, sums=1)),
        rows * sizes.held(queries=1, sums=1)
        + max(passes.backward, rows * sizes.held(queries=1, outputs=1, keys=1, gradients=1)),
    )


def keys_alive(plan: SequencePlan, rotation: RingSchedule, sizes: Sizes) -> Peak:
    """What each pass makes: results as they are summed, blocks at hand and on their way, and their gradients. Of the
    rank with most."""
    rows, straight = plan.shard, sizes.options.travel == "narrow"
    block, wide = sizes.held(keys=1), sizes.held(gradients=1)
    home = block if straight else wide
    forward = backward = 0
    for rank in range(rotation.world):
        blocks = blocks_alive(rotation, rank)
        forward = max(forward, max(blocks) * block)
        for here, moments in zip(blocks, alive_on_way(rotation, rank, straight, sizes), strict=True):
            most = max(on_way * wide + going * home for on_way, going in astuple(moments))
            backward = max(backward, here * block + most)
    return Peak(
        rows * sizes.held(outputs=1, sums=1) + forward,
        rows * sizes.held(outputs=1, gradients=1) + backward,
    )


def _refuses_striped(case: AttentionCase) -> str | None:
    if case.layout != "striped":
        return f"layout {case.layout!r}: it is the ring over the striped layout; use attention.layout=striped, or ring"
    return None


attend = define_operator("ring", forward, backward, tail=True)

_TAKES = frozenset({"travel"})

STRATEGIES = {
    "ring": Strategy("ring", attend, "zigzag", lambda case: None, summed(sends), peak, _TAKES, tail=True, sends=sends),
    "striped": Strategy(
        "striped", attend, "striped", _refuses_striped, summed(sends), peak, _TAKES, tail=True, sends=sends
    ),
}
