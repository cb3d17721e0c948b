"""Gather: all keys and values that my queries see are brought here, a few heads at a time.

Llama Team, "The Llama 3 Herd of Models" (2024), section 3.3.2 (context parallelism); its balance comes from the zigzag
layout. Unlike there, a rank receives only the rows that its queries see.

    for each group of key/value heads:             for each group of key/value heads:
        start gathering the next group                 start gathering the next group
        merge attention over all keys at once          dq, and dk, dv of all keys that are here
                                                       send dk, dv to the keys' owners, who sum them

Gathered keys are put in order of position, so that a zigzag shard owes two bands rather than tiles of every owner.
dk and dv are reduced by an all-to-all and a sum in rank order, in the accumulation dtype: what Gloo has for a
reduce-scatter sends twice as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.operator import Call, Saved, define_operator
from longctx.attention.partial import Partial, accumulation_dtype
from longctx.attention.registry import Sizes, Strategy, Volume
from longctx.comm import Pending, exchange
from longctx.sequence import SequencePlan

GROUPS = 4  # of key/value heads: so many times less memory for gathered keys, and all but the first arrive hidden
ROWS = 2  # the dim of tokens in gathered keys and values, [2, B, rows, heads, D]


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    parts = []
    tiles = call.plan.gathered(call.group.rank).tiles
    for heads, keys in gather_groups(q, k, v, call):
        partial = Partial(q[:, :, heads.queries])
        call.kernel.forward(q[:, :, heads.queries], keys[0], keys[1], tiles, call.scale, partial)
        parts.append(partial)
    return torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2)


def backward(dout: Tensor, saved: Saved, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    tiles = call.plan.gathered(call.group.rank).tiles
    returning: list[tuple[Heads, Returned]] = []
    for heads, keys in gather_groups(q, k, v, call):
        own = heads.queries
        shares = torch.zeros_like(keys, dtype=dtype)
        call.kernel.backward(
            dout[:, :, own], q[:, :, own], keys[0], keys[1], out[:, :, own], lse[:, :, own], tiles, call.scale,
            (dq[:, :, own], shares[0], shares[1]),
        )  # fmt: skip
        returning.append((heads, send_home(shares, k.dtype, call)))
    for heads, returned in returning:
        returned.add_to((dk[:, :, heads.keys], dv[:, :, heads.keys]), call)
    return dq, dk, dv


@dataclass(frozen=True)
class Heads:
    """A group of key/value heads, and the query heads that read them."""

    keys: slice
    queries: slice


def head_groups(heads: int, kv_heads: int) -> list[Heads]:
    width, per_key = -(-kv_heads // GROUPS), heads // kv_heads
    bounds = [(first, min(first + width, kv_heads)) for first in range(0, kv_heads, width)]
    return [Heads(slice(a, b), slice(a * per_key, b * per_key)) for a, b in bounds]


def gather_groups(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Iterator[tuple[Heads, Tensor]]:
    """Yields each group of heads with its keys and values ``[2, B, keys, heads, D]`` in order of position, while
    those of the next group are in flight."""
    groups = head_groups(q.shape[2], k.shape[2])
    order = torch.from_numpy(call.plan.gathered(call.group.rank).order).to(k.device, non_blocking=True)
    coming = gather(k, v, groups[0], call)
    for heads, following in zip(groups, [*groups[1:], None], strict=True):
        arrived = coming
        if following is not None:
            coming = gather(k, v, following, call)
        yield heads, arrived.wait(k, v, heads, call).index_select(ROWS, order)


@dataclass(frozen=True)
class Gathering:
    """Keys and values of one group of heads on their way here."""

    pending: Pending

    def wait(self, k: Tensor, v: Tensor, heads: Heads, call: Call) -> Tensor:
        """By owner, one behind the other: ``[2, B, keys, heads, D]``."""
        me = call.group.rank
        blocks = self.pending.wait()
        own = call.plan.reads(me, me)
        blocks.insert(me, torch.stack((own.take(k[:, :, heads.keys]), own.take(v[:, :, heads.keys]))))
        return torch.cat(blocks, ROWS)


def gather(k: Tensor, v: Tensor, heads: Heads, call: Call) -> Gathering:
    """Sends every other rank the rows that it sees, and expects those that this rank sees."""
    plan, me = call.plan, call.group.rank
    keys, values = k[:, :, heads.keys], v[:, :, heads.keys]
    sends, receives = [], []
    for other in others(call):
        rows = plan.reads(other, me)
        sends.append((other, torch.stack((rows.take(keys), rows.take(values)))))
        shape = (2, k.shape[0], len(plan.reads(me, other)), *keys.shape[2:])
        receives.append((other, k.new_empty(shape)))
    return Gathering(exchange(call.group, sends, receives))


@dataclass(frozen=True)
class Returned:
    """dk and dv of this rank's keys on their way home, beside its own share ``[2, B, rows, heads, D]``."""

    pending: Pending
    own: Tensor

    def add_to(self, home: tuple[Tensor, Tensor], call: Call) -> None:
        """Sums in rank order, so that the result does not depend on who came first."""
        me = call.group.rank
        arrived = self.pending.wait()
        arrived.insert(me, self.own)
        for reader, share in enumerate(arrived):
            for whole, part in zip(home, share, strict=True):
                call.plan.reads(reader, me).add_to(whole, part)


def send_home(shares: Tensor, dtype: torch.dtype, call: Call) -> Returned:
    """shares ``[2, B, keys, heads, D]`` in order of position, to the owners of the keys; ``narrow``: in ``dtype``."""
    plan, me = call.plan, call.group.rank
    gathered = plan.gathered(me)
    by_owner = torch.empty_like(shares)
    by_owner.index_copy_(ROWS, torch.from_numpy(gathered.order).to(shares.device, non_blocking=True), shares)
    parts = list(by_owner.split([len(rows) for rows in gathered.rows], ROWS))
    travel = dtype if call.options.travel == "narrow" else shares.dtype
    sends, receives = [], []
    for other in others(call):
        sends.append((other, parts[other].to(travel).contiguous()))
        shape = (*shares.shape[:ROWS], len(plan.reads(other, me)), *shares.shape[ROWS + 1 :])
        receives.append((other, shares.new_empty(shape, dtype=travel)))
    return Returned(exchange(call.group, sends, receives), parts[me])


def others(call: Call) -> list[int]:
    return [rank for rank in range(call.group.size) if rank != call.group.rank]


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """What a rank sends: its keys and values to each rank that sees them, in the backward pass once more, and
    dk and dv of all keys that it saw of others."""
    ranks = [other for other in range(plan.world) if other != rank]
    sent = [len(plan.reads(other, rank)) for other in ranks]
    seen = [len(plan.reads(rank, other)) for other in ranks]
    groups = len(head_groups(sizes.heads, sizes.kv_heads))
    gradient = sizes.keys if sizes.options.travel == "narrow" else sizes.key_gradients
    forward_bytes = 2 * sum(sent) * sizes.keys
    messages = groups * sum(map(bool, sent))
    return Volume(
        forward_bytes,
        forward_bytes + 2 * sum(seen) * gradient,
        messages,
        messages + groups * sum(map(bool, seen)),
    )


attend = define_operator("gather", forward, backward)

STRATEGIES = {"gather": Strategy("gather", attend, "zigzag", lambda case: None, volume, frozenset({"travel"}))}
