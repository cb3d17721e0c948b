"""Gather: each rank gathers the keys and values that its queries see, a few heads at a time.

Llama Team, "The Llama 3 Herd of Models" (2024), section 3.3.2 (context parallelism); its balance comes from the zigzag
layout. Unlike there, a rank receives only the rows that its queries see.

    forward:                                       backward:
    for each group of key/value heads:             for each group of key/value heads:
        gather k, v of the next group                  gather k, v of the next group
        attention of q over all gathered k, v          dq; dk, dv of all gathered k, v
                                                       send dk, dv to their owners, who sum them

Gathered keys are sorted by position, so that a zigzag shard needs two bands rather than tiles of every owner. Gradients
are reduced by an all-to-all and a sum in rank order, in the accumulation dtype. What Gloo has for a reduce-scatter
sends twice as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy
from longctx.comm import Pending, exchange
from longctx.sequence import Rows, gathered_keys

GROUPS = 4  # of key/value heads: so many times less memory for gathered keys, and all but the first arrive hidden
ROWS = 2  # the dim of tokens in gathered keys and values, [2, B, rows, heads, D]


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries; q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``."""
    partial = Partial(q)
    tiles = gathered_keys(context.plan, context.group.rank).tiles
    for heads, keys in gather_groups(q, k, v, context):
        own = heads.queries
        context.kernel.forward(q[:, :, own], keys[0], keys[1], tiles, context.scale, partial.of_heads(own))
        del keys  # or they would be here when those of the next heads are sorted
    return partial.out, partial.lse


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v in the accumulation dtype."""
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    tiles = gathered_keys(context.plan, context.group.rank).tiles
    in_flight: GradientsInFlight | None = None  # dk, dv of the group of heads before, while this one computes
    for heads, keys in gather_groups(q, k, v, context):
        own = heads.queries
        shares = torch.zeros_like(keys, dtype=dtype)
        context.kernel.backward(
            dout[:, :, own], q[:, :, own], keys[0], keys[1], out[:, :, own], lse[:, :, own], tiles, context.scale,
            (dq[:, :, own], shares[0], shares[1]),
        )  # fmt: skip
        del keys
        if in_flight:
            in_flight.add_to(dk, dv, context)
            in_flight = None
        in_flight = send_gradients(shares, heads, k.dtype, context)
        del shares
    if in_flight:
        in_flight.add_to(dk, dv, context)
    return dq, dk, dv


@dataclass(frozen=True)
class Heads:
    """Names a group of key/value heads, and the query heads that read them."""

    keys: slice
    queries: slice


def head_groups(heads: int, kv_heads: int) -> list[Heads]:
    """Returns the groups of heads that are gathered one after another."""
    width, per_key = -(-kv_heads // GROUPS), heads // kv_heads
    bounds = [(first, min(first + width, kv_heads)) for first in range(0, kv_heads, width)]
    return [Heads(slice(a, b), slice(a * per_key, b * per_key)) for a, b in bounds]


def gather_groups(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Iterator[tuple[Heads, Tensor]]:
    """Yields each group of heads with its gathered keys and values, while those of the next group are in flight.

    Keys and values ``[2, B, keys, heads, D]`` are in order of position.
    """
    groups = head_groups(q.shape[2], k.shape[2])
    pending = gather(k, v, groups[0], context)
    for heads, following in zip(groups, [*groups[1:], None], strict=True):
        current = pending
        if following is not None:
            pending = gather(k, v, following, context)
        keys = sort_by_position(current, k, v, heads, context)
        del current  # or its buffers would last as long as the computing
        yield heads, keys
        del keys


def gather(k: Tensor, v: Tensor, heads: Heads, context: AttentionContext) -> Pending:
    """Sends every other rank the rows that it sees, and expects those that this rank sees."""
    plan, me = context.plan, context.group.rank
    keys, values = k[:, :, heads.keys], v[:, :, heads.keys]
    sends, receives = [], []
    packed: dict[Rows, Tensor] = {}  # ranks that see the same rows are sent one buffer
    for other in context.group.others:
        rows = plan.reads(other, me)
        if rows not in packed:
            packed[rows] = torch.stack((rows.take(keys), rows.take(values)))
        sends.append((other, packed[rows]))
        shape = (2, k.shape[0], len(plan.reads(me, other)), *keys.shape[2:])
        receives.append((other, k.new_empty(shape)))
    return exchange(context.group, sends, receives)


def sort_by_position(pending: Pending, k: Tensor, v: Tensor, heads: Heads, context: AttentionContext) -> Tensor:
    """Returns the gathered keys and values with this rank's own, in order of position, ``[2, B, keys, heads, D]``."""
    me, gathered = context.group.rank, gathered_keys(context.plan, context.group.rank)
    keys, places = k[:, :, heads.keys], gathered.places
    whole = k.new_empty(2, k.shape[0], len(gathered.places.positions), *keys.shape[2:])
    for part, own in zip(whole, (keys, v[:, :, heads.keys]), strict=True):
        places.put(me, gathered.rows[me].take(own), part)
    for other, block in zip(context.group.others, pending.wait(), strict=True):
        places.put(other, block, whole, ROWS)
    return whole


@dataclass(frozen=True)
class GradientsInFlight:
    """Holds dk and dv of this rank's keys that are in flight, and its own share ``[2, B, rows, heads, D]``."""

    pending: Pending
    own: Tensor
    heads: Heads

    def add_to(self, dk: Tensor, dv: Tensor, context: AttentionContext) -> None:
        """Adds all ranks' shares to dk and dv, in rank order, so that the sum does not depend on who came first."""
        me = context.group.rank
        arrived = self.pending.wait()
        arrived.insert(me, self.own)
        for reader, share in enumerate(arrived):
            for grad, part in zip((dk, dv), share, strict=True):
                context.plan.reads(reader, me).add_to(grad[:, :, self.heads.keys], part)


def send_gradients(shares: Tensor, heads: Heads, dtype: torch.dtype, context: AttentionContext) -> GradientsInFlight:
    """Sends dk and dv of the gathered keys to the keys' owners.

    shares ``[2, B, keys, heads, D]`` in order of position; ``dtype``: of the inputs.
    """
    plan, me = context.plan, context.group.rank
    grad_dtype = dtype if context.options.grad_dtype == "compute" else shares.dtype
    sends, receives = [], []
    for other in context.group.others:
        sends.append((other, _gradients_of(shares, other, context).to(grad_dtype)))
        shape = (*shares.shape[:ROWS], len(plan.reads(other, me)), *shares.shape[ROWS + 1 :])
        receives.append((other, shares.new_empty(shape, dtype=grad_dtype)))
    return GradientsInFlight(exchange(context.group, sends, receives), _gradients_of(shares, me, context), heads)


def _gradients_of(shares: Tensor, owner: int, context: AttentionContext) -> Tensor:
    """Those of the owner's keys."""
    places = gathered_keys(context.plan, context.group.rank).places
    part = shares.new_empty(*shares.shape[:ROWS], places.counts[owner], *shares.shape[ROWS + 1 :])
    places.pick(owner, shares, part, ROWS)
    return part


GATHER = Strategy(
    "gather",
    define_strategy("gather", forward, backward, tail=True),
    options=frozenset({"grad_dtype"}),
    half=True,
    costs="longctx.attention.costs.gather:COSTS",
)
