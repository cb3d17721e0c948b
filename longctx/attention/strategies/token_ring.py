"""TokenRing: keys and values stay, queries travel one way, and their attention comes home the other way.

Wang et al., "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional
Communication" (2024). The published code has no backward pass; this one is of the same kind.

    for hop = 0 .. P-1:                            for hop = 0 .. P-1, of (Q, dO, lse, delta):
        pass my queries on, expect the next            pass my block on, expect the next
        (O, lse) of them over my keys                  dK, dV += ..., dQ of my block = ...
        send (O, lse) home                             send dQ home
        merge what the hop before has brought home     add what the hop before has brought home

Queries move one neighbour per hop, in the direction that moves fewer rows; what comes of them returns directly,
hop ranks the other way, while the next hop computes, on a channel of its own, so that both directions of the links
are in use. The last hop's returns are exposed. Outputs and dq return in the accumulation dtype or, where
``grad_dtype`` is ``compute``, in that of the inputs, and only for queries that the sender's keys are seen by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy, work_at_keys
from longctx.attention.runtime.ring_transport import select_rows, send_home, travel
from longctx.attention.strategies.burst import pass_queries_backward
from longctx.comm import Pending
from longctx.sequence import Rows, SequencePlan, query_ring
from longctx.sequence.tiles import query_rows

Return = tuple[int, Rows, Pending]  # a holder, the local queries that it attended to, their (out, lse) under way


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    plan, rotation, me = call.plan, query_ring(call.plan), call.group.rank
    partial = Partial(q)
    returning: Return | None = None
    own = rotation.carried(me, 0)
    # Blocks are [1, B, rows, H/TP, D].
    for hop, rows, [[queries]] in travel((own.take(q).contiguous().unsqueeze(0),), rotation, call.group):
        owner, holder = rotation.owner(me, hop), rotation.holder(me, hop)
        tiles = plan.visiting_tiles(owner, me, rows)
        share = Partial(queries) if hop else partial
        call.kernel.forward(queries, k, v, tiles, call.scale, share)
        if hop == 0:
            continue
        leaving, coming = rotation.at(owner, hop).read, rotation.at(me, hop).read
        out = select_rows(share.out.unsqueeze(0), rows, leaving).to(_returned(q, call))
        lse = select_rows(share.lse.unsqueeze(0), rows, leaving)
        following = holder, coming, send_home((out, lse), hop, leaving, coming, rotation, call.group)
        if returning:
            _merge(returning, plan, me, partial)
        returning = following
    if returning:
        _merge(returning, plan, me, partial)
    return partial.out, partial.lse


def _merge(returning: Return, plan: SequencePlan, me: int, into: Partial) -> None:
    """Takes in what the holder's keys are to local queries; rows that none of them concerns came without meaning."""
    holder, rows, pending = returning
    [out], [lse] = pending.wait()
    for tiles in plan.tiles(me, holder):  # apart for batch rows that differ
        batch = slice(tiles.batch_start, tiles.batch_stop)
        for start, stop in query_rows([tiles]).intervals:
            place = rows.locate(start, stop)
            packed = slice(place, place + stop - start)
            into.merge(batch, slice(start, stop), out[batch, packed], lse[batch, packed])


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v."""
    return pass_queries_backward(dout, saved, call, query_ring(call.plan), _returned(saved[0], call))


def _returned(q: Tensor, call: AttentionContext) -> torch.dtype:
    """In what dtype outputs and gradients come home."""
    return q.dtype if call.options.grad_dtype == "compute" else accumulation_dtype(q.dtype)


TOKEN_RING = Strategy(
    "token_ring",
    define_strategy("token_ring", forward, backward),
    options=frozenset({"grad_dtype"}),
    two_way=True,
    work=work_at_keys,
    costs="longctx.attention.costs.token_ring:COSTS",
)
