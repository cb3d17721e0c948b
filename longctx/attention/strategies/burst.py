"""BurstAttention: a double ring of keys and values forward; backward, whichever side is smaller rotates.

Sun, Zhao, Han, Yang, Liu, Shi, Sun, "BurstAttention: An Efficient Distributed Attention Framework for Extremely
Long Sequences" (2024); "BurstEngine: an Efficient Distributed Framework for Training Transformers on Extremely Long
Sequences of over 1M Tokens" (2025), whose topology-aware ring and backward communication these are.

Ranks are a grid: rows of ``inner`` neighbours (of one node), N rows.

    forward, blocks are (k, v):                    backward where queries rotate, k, v, dk, dv stay:
    for lap = 0 .. N-1:                            delta = rowsum(dout * out)
        send a copy of the block to the next row   for the same hops, blocks are (q, dout, lse, delta):
        for step = 0 .. inner-1:                       send the block on, receive the next
            send the block on, receive the next        dk, dv += ...; dq of the block = ...
            partial = merge(partial, q over block)     add the dq that was sent on behind it
            wait for the next block                    send dq on behind the block
        wait for the copy                          at a lap's end dq returns to the block's owner

The copy between rows is in flight for a whole lap. It carries what later laps read; blocks inside a lap carry what the
lap still reads. A lap's sum of gradients returns directly, on a channel of its own, instead of waiting for the next
lap's. As many bytes cross, and the lap after it hides them. One row of all ranks, or rows of one, are the plain ring.
Where keys and values rotate backward too, that is the ring's backward over this schedule.

Rotating queries costs 2 h (D e + w) + h D w bytes a row, rotating keys and values 2 k D (e + w). Here are h query
heads, k key/value heads, e bytes an element and w an accumulator. Each counts the rows that masks leave to be sent
(``longctx.sequence.ring_schedule``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.delta import delta_of, surrogate_out
from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Grid, Strategy
from longctx.attention.runtime.ring_transport import Block, GradientReturn, rotate_blocks, zeros
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.ring import pass_keys, pass_keys_backward
from longctx.comm import Group
from longctx.sequence import RingSchedule, Rows, SequencePlan, key_ring, query_ring


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries; q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``."""
    return pass_keys(q, k, v, context, key_ring(context.plan, _inner(context.group)))


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v, by rotating the side that costs fewer bytes.

    Every rank comes to the same side: it depends on the plan and on shapes.
    """
    q, k, *_ = saved
    sizes = Sizes(
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        element=q.element_size(),
        wide=accumulation_dtype(q.dtype).itemsize,
        inner=_inner(context.group),
        options=context.options,
    )
    if side_of(context.plan, sizes) == "kv":
        return pass_keys_backward(dout, saved, context, key_ring(context.plan, sizes.inner))
    direct_dtype = q.dtype if context.options.grad_dtype == "compute" else None
    return pass_queries_backward(dout, saved, context, query_ring(context.plan, sizes.inner), direct_dtype)


def pass_queries_backward(
    dout: Tensor, saved: Saved, context: AttentionContext, schedule: RingSchedule, direct_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v, rotating blocks of (q, dout, lse, delta).

    ``direct_dtype``: shares of dq return to their owners one by one, in this dtype; None: summed on their way.
    """
    q, k, v, out, _ = saved
    dtype, me = accumulation_dtype(q.dtype), context.group.rank
    dk, dv = zeros(k, dtype), zeros(v, dtype)
    gradients = GradientReturn((zeros(q, dtype),), schedule, context.group, direct_dtype)
    for hop, rows, [(block_q, block_dout), (block_lse, block_delta)] in rotate_blocks(
        _block(dout, saved, schedule.carried(me, 0)), schedule, context.group
    ):
        tiles = context.plan.visiting_tiles(schedule.owner(me, hop), me, rows)
        [dq] = gradients.buffer(hop, rows)
        block_out = surrogate_out(block_dout, block_delta) if hop else rows.take(out)
        block = (block_dout, block_q, k, v, block_out, block_lse)
        context.kernel.backward(*block, tiles, context.scale, (dq, dk, dv))
        gradients.send(hop)
        del block_q, block_dout, block_lse, block_delta, block_out, block, dq
    [dq] = gradients.finish()
    return dq, dk, dv


def _block(dout: Tensor, saved: Saved, rows: Rows) -> Block:
    """The rank's block: queries and dout ``[2, B, rows, H/TP, D]``, lse and delta ``[2, B, rows, H/TP]``."""
    q, _, _, out, lse = saved
    delta = delta_of(dout, out)
    return torch.stack((rows.take(q), rows.take(dout))), torch.stack((rows.take(lse), rows.take(delta)))


def side_of(plan: SequencePlan, sizes: Sizes) -> str:
    """Returns what rotates in the backward pass, "kv" or "q".

    It is the side that was asked for, or the one that costs all ranks together fewer bytes.
    """
    if sizes.options.backward_rotates != "auto":
        return sizes.options.backward_rotates

    def cost(side: str) -> int:
        schedule, block, gradients = schedule_of(plan, side, sizes)
        summed, direct = schedule.gradient_rows
        return sum(schedule.cost) * block + (direct if sizes.options.grad_dtype == "compute" else summed) * gradients

    return min(("kv", "q"), key=cost)


def schedule_of(plan: SequencePlan, side: str, sizes: Sizes) -> tuple[RingSchedule, int, int]:
    """Returns the schedule of the backward pass, and bytes of a row that is passed on and of its gradients."""
    compute = sizes.options.grad_dtype == "compute"
    if side == "kv":
        return key_ring(plan, sizes.inner), 2 * sizes.keys, 2 * (sizes.keys if compute else sizes.key_gradients)
    gradients = sizes.queries if compute else sizes.query_gradients
    return query_ring(plan, sizes.inner), 2 * (sizes.queries + sizes.lse), gradients


def _inner(group: Group) -> int:
    """Ranks in a row; a group that is no grid, of one rank, is one row."""
    return group.size if group.inner is None else group.inner.size


def _one_row(case: AttentionCase) -> int:
    """Without word of nodes all ranks are neighbours."""
    return case.world


BURST = Strategy(
    "burst",
    define_strategy("burst", forward, backward, tail=True),
    options=frozenset({"grad_dtype", "backward_rotates", "inner_ring"}),
    grid=Grid(_one_row, option="inner_ring"),
    two_way=True,
    half=True,
    costs="longctx.attention.costs.burst:COSTS",
)
