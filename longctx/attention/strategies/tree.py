"""Tree attention: keys and values stay, queries visit every rank, and partials are reduced on the queries' owners.

Shyam, Pilault, Shepperd, Anthony, Millidge, "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU
clusters" (2024), section 3. Softmax attention is a reduction: (out, lse) of any two sets of keys merge into those of
both, in any order. Every rank computes partials of everyone's queries over its own keys; a reduce-scatter returns to
each rank its own queries' partials, merged. Its decoding form is ``longctx.attention.decoding.tree_decoding``.

    forward, on rank r:                            backward, on rank r:
    for step = 0 .. P-1:                           for step = 0 .. P-1:
        receive q of rank r - step - 1                 receive q, dout, out, lse of rank r - step - 1
        (out, lse) of q of r - step over my k, v       dq of q of r - step; dk, dv += ...
        return (out, lse) to rank r - step             return dq to rank r - step
        merge what rank r + step - 1 returned          add what rank r + step - 1 returned

The reduce-scatter is direct: each rank returns each owner's partials to it at once. That takes P - 1 messages in place
of the log2 P of recursive halving. Both are trees in which each owner is the root of P - 1 edges. An edge of the
halving tree carries the union of the rows below it, so it never sends less (as much where everyone sees everything: P -
1 shards a rank). It also starts once all P shards of queries are computed and held. Here those of two steps are held,
each in flight while another computes. A rank returns only rows that see a key of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy, work_at_keys
from longctx.comm import Pending, exchange
from longctx.sequence import Rows, TileSet

Block = tuple[Tensor, ...]  # tensors of the same tokens, [B, rows, H/TP, ...]


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries; q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``."""
    partial = Partial(q)
    returning: tuple[Rows, Pending] | None = None
    for step, (block_q,), tiles in visiting_queries((q,), context):
        block_partial = Partial(block_q) if step else partial
        context.kernel.forward(block_q, k, v, tiles, context.scale, block_partial)
        del block_q  # or it would still be here when the next but one is posted
        following = return_to_owner((block_partial.out, block_partial.lse), step, context) if step else None
        if returning:
            partial.merge_packed(returning[0], *returning[1].wait())
        returning = following
    if returning:
        partial.merge_packed(returning[0], *returning[1].wait())
    return partial.out, partial.lse


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v.

    dk and dv are complete where they are computed. Given the global lse, shares of dq just add up.
    """
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    grad_dtype = q.dtype if context.options.grad_dtype == "compute" else dtype
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    returning: tuple[Rows, Pending] | None = None
    for step, (block_q, block_dout, block_out, block_lse), tiles in visiting_queries((q, dout, out, lse), context):
        block_dq = torch.zeros_like(block_q, dtype=dtype) if step else dq
        block = (block_dout, block_q, k, v, block_out, block_lse)
        context.kernel.backward(*block, tiles, context.scale, (block_dq, dk, dv))
        del block_q, block_dout, block_out, block_lse, block
        following = return_to_owner((block_dq.to(grad_dtype),), step, context) if step else None
        del block_dq  # what leaves is a copy where its dtype is another
        if returning:
            returning[0].add_to(dq, returning[1].wait()[0])
        returning = following
    if returning:
        returning[0].add_to(dq, returning[1].wait()[0])
    return dq, dk, dv


def visiting_queries(block: Block, context: AttentionContext) -> Iterator[tuple[int, Block, tuple[TileSet, ...]]]:
    """Yields (step, tensors of visiting queries, tiles over this rank's keys) while the next visitors are in flight.

    ``block``: tensors of this rank's own tokens, which come first, as they lie. Of other ranks come the tokens that see
    a key of this rank.
    """
    plan, me, world = context.plan, context.group.rank, context.group.size
    visitors, tiles = block, plan.tiles(me, me)
    for step in range(world):
        coming = send_queries(block, step + 1, context) if step + 1 < world else None
        yield step, visitors, tiles
        if coming is not None:
            owner = (me - step - 1) % world
            visitors = tuple(coming.wait())
            del coming  # and with it the copies that it has sent, before the next are made
            tiles = plan.visiting_tiles(owner, me, plan.sees(owner, me))


def send_queries(block: Block, step: int, context: AttentionContext) -> Pending:
    """Sends this rank's queries that see a key of rank me + step to it; expects those of rank me - step."""
    plan, me, world = context.plan, context.group.rank, context.group.size
    holder, owner = (me + step) % world, (me - step) % world
    leaving, coming = plan.sees(me, holder), plan.sees(owner, me)
    return exchange(
        context.group,
        sends=[(holder, leaving.take(part).contiguous()) for part in block],
        receives=[(owner, _buffer(part, coming)) for part in block],
    )


def return_to_owner(results: Block, step: int, context: AttentionContext) -> tuple[Rows, Pending]:
    """Sends the results of this step's visiting queries to their owner.

    Returns the rows of this rank's own tokens that visited rank me + step, and the arrival of their results.
    """
    plan, me, world = context.plan, context.group.rank, context.group.size
    holder, owner = (me + step) % world, (me - step) % world
    own = plan.sees(me, holder)
    arrival = exchange(
        context.group,
        sends=[(owner, part) for part in results],
        receives=[(holder, _buffer(part, own)) for part in results],
    )
    return own, arrival


def _buffer(part: Tensor, rows: Rows) -> Tensor:
    return part.new_empty(part.shape[0], len(rows), *part.shape[2:])


TREE = Strategy(
    "tree",
    define_strategy("tree", forward, backward, tail=True),
    options=frozenset({"grad_dtype"}),
    half=True,
    work=work_at_keys,
    costs="longctx.attention.costs.tree:COSTS",
)
