"""BurstAttention: a double ring of keys forward; backward, whichever side is smaller travels.

Sun, Zhao, Han, Yang, Liu, Shi, Sun, "BurstAttention: An Efficient Distributed Attention Framework for Extremely
Long Sequences" (2024); "BurstEngine: an Efficient Distributed Framework for Training Transformers on Extremely Long
Sequences of over 1M Tokens" (2025), whose topology-aware ring and backward communication these are.

Ranks are a grid: rows of ``inner`` neighbours (of one node), N rows.

    forward:                                       backward on the queries' side, K, V, dK, dV stay:
    for lap = 0 .. N-1:                            delta = rowsum(dO * O)
        copy my block to the next row                  for the same hops, of (Q, dO, lse, delta) for K, V:
        for step = 0 .. inner-1:                           pass my block on, expect the next
            pass my block on, expect the next              dK, dV += ..., dQ of my block = ...
            merge attention of q over my block             + the dQ that rode behind it
            take the block that arrived                    send dQ after its block, one step behind
        take the copy that arrived                     at a lap's end dQ goes home

The copy between rows is under way for a whole lap. It carries what later laps read; blocks inside a lap carry
what the lap still reads. A lap's sum of gradients goes straight home, on a channel of its own, instead of waiting
for the next lap's: as many bytes cross, and the lap after it hides them. One row of all ranks, or rows of one, are
the plain ring. The keys' side is the ring's backward over this route.

Queries' side costs 2 h (D e + w) + h D w bytes a row, keys' side 2 k D (e + w): h heads, k of them of keys, e bytes
a number and w an accumulator, times what each side's masks leave to be sent (``longctx.sequence.ring_schedule``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.delta import delta_of, stand_in
from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Grid, Strategy
from longctx.attention.runtime.ring_transport import Block, GradientReturn, travel, zeros
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.ring import pass_keys, pass_keys_backward
from longctx.comm import Group
from longctx.sequence import RingSchedule, Rows, SequencePlan, key_ring, query_ring


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    return pass_keys(q, k, v, call, key_ring(call.plan, _inner(call.group)))


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v. Every rank comes to the same side: it depends on the plan and on shapes."""
    q, k, *_ = saved
    sizes = Sizes(
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        element=q.element_size(),
        wide=accumulation_dtype(q.dtype).itemsize,
        inner=_inner(call.group),
        options=call.options,
    )
    if side_of(call.plan, sizes) == "kv":
        return pass_keys_backward(dout, saved, call, key_ring(call.plan, sizes.inner))
    direct_dtype = q.dtype if call.options.grad_dtype == "compute" else None
    return pass_queries_backward(dout, saved, call, query_ring(call.plan, sizes.inner), direct_dtype)


def pass_queries_backward(
    dout: Tensor, saved: Saved, call: AttentionContext, rotation: RingSchedule, direct_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients where queries travel. ``direct_dtype``: shares of dq go home by themselves, in this dtype."""
    q, k, v, out, _ = saved
    dtype, me = accumulation_dtype(q.dtype), call.group.rank
    dk, dv = zeros(k, dtype), zeros(v, dtype)
    gradients = GradientReturn((zeros(q, dtype),), rotation, call.group, direct_dtype)
    for hop, rows, [(queries, upstream), (block_lse, delta)] in travel(
        _queries(dout, saved, rotation.carried(me, 0)), rotation, call.group
    ):
        tiles = call.plan.visiting_tiles(rotation.owner(me, hop), me, rows)
        [dq] = gradients.buffer(hop, rows)
        outputs = stand_in(upstream, delta) if hop else rows.take(out)
        given = (upstream, queries, k, v, outputs, block_lse)
        call.kernel.backward(*given, tiles, call.scale, (dq, dk, dv))
        gradients.send(hop)
        del queries, upstream, block_lse, delta, outputs, given, dq
    [dq] = gradients.finish()
    return dq, dk, dv


def _queries(dout: Tensor, saved: Saved, rows: Rows) -> Block:
    """The rank's block: queries and dout ``[2, B, rows, H/TP, D]``, lse and delta ``[2, B, rows, H/TP]``."""
    q, _, _, out, lse = saved
    delta = delta_of(dout, out)
    return torch.stack((rows.take(q), rows.take(dout))), torch.stack((rows.take(lse), rows.take(delta)))


def side_of(plan: SequencePlan, sizes: Sizes) -> str:
    """What travels in the backward pass: as asked, or what costs all ranks together fewer bytes."""
    if sizes.options.backward_rotates != "auto":
        return sizes.options.backward_rotates

    def cost(side: str) -> int:
        rotation, block, gradients = route_of(plan, side, sizes)
        summed, direct = rotation.gradient_rows
        return sum(rotation.cost) * block + (direct if sizes.options.grad_dtype == "compute" else summed) * gradients

    return min(("kv", "q"), key=cost)


def route_of(plan: SequencePlan, side: str, sizes: Sizes) -> tuple[RingSchedule, int, int]:
    """Of the backward pass: the rotation, bytes of a row that is passed on, and of its gradients."""
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
