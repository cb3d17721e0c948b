"""Tree attention: keys and values stay, queries of all ranks visit them, and partials are reduced at home.

Shyam, Pilault, Shepperd, Anthony, Millidge, "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU
clusters" (2024), section 3: softmax attention is a reduction, for (out, lse) of any two sets of keys merge into those
of both, in any order. Every rank computes partials of everyone's queries over its own keys; a reduce-scatter returns
to each rank its own queries' partials, merged. Its decoding form is ``longctx.attention.decoding.tree_decoding``.

    for step = 0 .. P-1, me being rank r:          for step = 0 .. P-1:
        bring the queries of rank r - step - 1         bring q, dout, out, lse of rank r - step - 1
        (out, lse) of r - step's over my keys          dq of r - step's queries; dk, dv of mine += ...
        return them; merge those of mine               return dq; add that of mine
           from rank r + step - 1                         from rank r + step - 1

The reduce-scatter is direct: each rank returns each owner's partials to it at once, P - 1 messages in place of the
log2 P of recursive halving. Both are trees in which each owner is the root of P - 1 edges; an edge of the halving tree
carries the union of the rows below it, so it never sends less (as much where everyone sees everything: P - 1 shards a
rank). And it starts once all P shards of queries are computed and held, where this holds those of two steps, each in
flight while another computes. A rank returns only rows that see a key of its own.
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


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    own = Partial(q)
    returning: tuple[Rows, Pending] | None = None
    for step, (queries,), tiles in visits((q,), call):
        partial = Partial(queries) if step else own
        call.kernel.forward(queries, k, v, tiles, call.scale, partial)
        del queries  # or it would still be here when the next but one is posted
        following = send_home((partial.out, partial.lse), step, call) if step else None
        if returning:
            own.merge_packed(returning[0], *returning[1].wait())
        returning = following
    if returning:
        own.merge_packed(returning[0], *returning[1].wait())
    return own.out, own.lse


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """dk and dv are complete where they are computed. Given the global lse, shares of dq just add up."""
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    travel = q.dtype if call.options.grad_dtype == "compute" else dtype
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    returning: tuple[Rows, Pending] | None = None
    for step, (queries, upstream, outputs, sums), tiles in visits((q, dout, out, lse), call):
        share = torch.zeros_like(queries, dtype=dtype) if step else dq
        grads = (share, dk, dv)
        call.kernel.backward(upstream, queries, k, v, outputs, sums, tiles, call.scale, grads)
        del queries, upstream, outputs, sums
        following = send_home((share.to(travel),), step, call) if step else None
        if returning:
            returning[0].add_to(dq, returning[1].wait()[0])
        returning = following
    if returning:
        returning[0].add_to(dq, returning[1].wait()[0])
    return dq, dk, dv


def visits(block: Block, call: AttentionContext) -> Iterator[tuple[int, Block, tuple[TileSet, ...]]]:
    """Yields (step, the visiting tokens' tensors, tiles over my keys) while the next visitors are in flight.

    ``block``: tensors of this rank's own tokens, which come first, as they lie; of others come those that see a
    key of this rank.
    """
    plan, me, world = call.plan, call.group.rank, call.group.size
    visitors, tiles = block, plan.tiles(me, me)
    for step in range(world):
        coming = send_visitors(block, step + 1, call) if step + 1 < world else None
        yield step, visitors, tiles
        if coming is not None:
            owner = (me - step - 1) % world
            visitors = tuple(coming.wait())
            tiles = plan.visiting_tiles(owner, me, plan.sees(owner, me))


def send_visitors(block: Block, step: int, call: AttentionContext) -> Pending:
    """Sends my tokens that see a key of rank me + step to it; expects those of rank me - step that see mine."""
    plan, me, world = call.plan, call.group.rank, call.group.size
    host, guest = (me + step) % world, (me - step) % world
    leaving, coming = plan.sees(me, host), plan.sees(guest, me)
    return exchange(
        call.group,
        sends=[(host, leaving.take(part).contiguous()) for part in block],
        receives=[(guest, _buffer(part, coming)) for part in block],
    )


def send_home(results: Block, step: int, call: AttentionContext) -> tuple[Rows, Pending]:
    """Sends what was computed for the visitors of this step to their owner.

    Returns the rows of this rank's own tokens that visited rank me + step, and the arrival of their results.
    """
    plan, me, world = call.plan, call.group.rank, call.group.size
    host, guest = (me + step) % world, (me - step) % world
    own = plan.sees(me, host)
    arrival = exchange(
        call.group,
        sends=[(guest, part) for part in results],
        receives=[(host, _buffer(part, own)) for part in results],
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
