"""TokenRing: keys and values stay, queries rotate one way, and their results return the other way.

Wang et al., "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional
Communication" (2024). The published code has no backward pass; this one is of the same kind.

    forward, blocks are q:                         backward, blocks are (q, dout, lse, delta):
    for hop = 0 .. P-1:                            for hop = 0 .. P-1:
        send the block on, receive the next            send the block on, receive the next
        (out, lse) of the block over my k, v           dk, dv += ...; dq of the block = ...
        return (out, lse) to the block's owner         return dq to the block's owner
        merge what returned in the hop before          add what returned in the hop before

Queries move one neighbour per hop, in the direction that moves fewer rows. Their results return directly, hop ranks the
other way, while the next hop computes. They have a channel of their own, so that both directions of the links are in
use. The last hop's returns are exposed. Outputs and dq return in the accumulation dtype or, where ``grad_dtype`` is
``compute``, in that of the inputs. Only rows of queries that see a key of the sender return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy, work_at_keys
from longctx.attention.runtime.ring_transport import return_to_owner, rotate_blocks, select_rows
from longctx.attention.strategies.burst import pass_queries_backward
from longctx.comm import Pending
from longctx.sequence import Rows, SequencePlan, query_ring
from longctx.sequence.tiles import query_rows

Returning = tuple[int, Rows, Pending]  # a holder, the local queries that it attended to, their (out, lse) in flight


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries; q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``."""
    plan, schedule, me = context.plan, query_ring(context.plan), context.group.rank
    partial = Partial(q)
    returning: Returning | None = None
    own = schedule.carried(me, 0)
    # Blocks are [1, B, rows, H/TP, D].
    for hop, rows, [[block_q]] in rotate_blocks((own.take(q).contiguous().unsqueeze(0),), schedule, context.group):
        owner, holder = schedule.owner(me, hop), schedule.holder(me, hop)
        tiles = plan.visiting_tiles(owner, me, rows)
        block_partial = Partial(block_q) if hop else partial
        context.kernel.forward(block_q, k, v, tiles, context.scale, block_partial)
        if hop == 0:
            continue
        sent, expected = schedule.at(owner, hop).read, schedule.at(me, hop).read
        out = select_rows(block_partial.out.unsqueeze(0), rows, sent).to(_return_dtype(q, context))
        lse = select_rows(block_partial.lse.unsqueeze(0), rows, sent)
        following = holder, expected, return_to_owner((out, lse), hop, sent, expected, schedule, context.group)
        if returning:
            _merge(returning, plan, me, partial)
        returning = following
    if returning:
        _merge(returning, plan, me, partial)
    return partial.out, partial.lse


def _merge(returning: Returning, plan: SequencePlan, me: int, into: Partial) -> None:
    """Merges a holder's results into those of local queries; rows that see none of its keys are skipped."""
    holder, rows, pending = returning
    [out], [lse] = pending.wait()
    for tiles in plan.tiles(me, holder):  # apart for batch rows that differ
        batch = slice(tiles.batch_start, tiles.batch_stop)
        for start, stop in query_rows([tiles]).intervals:
            place = rows.locate(start, stop)
            packed = slice(place, place + stop - start)
            into.merge(batch, slice(start, stop), out[batch, packed], lse[batch, packed])


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v."""
    return pass_queries_backward(dout, saved, context, query_ring(context.plan), _return_dtype(saved[0], context))


def _return_dtype(q: Tensor, context: AttentionContext) -> torch.dtype:
    """The dtype in which outputs and gradients return to their owners."""
    return q.dtype if context.options.grad_dtype == "compute" else accumulation_dtype(q.dtype)


TOKEN_RING = Strategy(
    "token_ring",
    define_strategy("token_ring", forward, backward),
    options=frozenset({"grad_dtype"}),
    two_way=True,
    work=work_at_keys,
    costs="longctx.attention.costs.token_ring:COSTS",
)
