"""Swapping axes inside a row of ranks: from some tokens with all heads to all tokens with some heads, and back.

Two operators, ``to_heads`` and ``to_tokens``, and their adjoints. Ulysses and USP put other operators between them.
Tokens of a row arrive in order of position, as its joined plan (``SequencePlan.joined``) has them, so that layouts,
documents and windows are whatever that plan says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longctx.attention.operator import Attend, register, require_fit
from longctx.attention.partial import accumulation_dtype
from longctx.attention.registry import Sent, Sizes, Volume
from longctx.comm import Group, Pending, exchange, group_named, outer_name
from longctx.sequence import Places, SequencePlan, plan_of


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each of ``ranks`` has; key/value head ``h * kv_heads // heads`` belongs to query head h."""

    heads: int
    kv_heads: int
    ranks: int

    @property
    def queries(self) -> int:
        """Query heads of every rank."""
        return self.heads // self.ranks

    def query_heads(self, rank: int) -> slice:
        return slice(rank * self.queries, (rank + 1) * self.queries)

    def key_heads(self, rank: int) -> slice:
        """Those that the rank's query heads read; ranks share heads where there are fewer of them."""
        own = self.query_heads(rank)
        return slice(own.start * self.kv_heads // self.heads, (own.stop - 1) * self.kv_heads // self.heads + 1)

    def keys(self, rank: int) -> int:
        """How many of those."""
        own = self.key_heads(rank)
        return own.stop - own.start

    def copies(self, rank: int) -> list[int] | None:
        """Which of ``key_heads`` each query head reads, where a kernel would not find it by itself: then each
        query head gets a copy."""
        own, first = self.query_heads(rank), self.key_heads(rank).start
        read = [head * self.kv_heads // self.heads - first for head in range(own.start, own.stop)]
        count = self.keys(rank)
        fits = self.queries % count == 0 and all(key == i * count // self.queries for i, key in enumerate(read))
        return None if fits else read

    def local_keys(self, rank: int) -> int:
        """Key/value heads that the rank's kernel sees."""
        return self.keys(rank) if self.copies(rank) is None else self.queries


@dataclass(frozen=True)
class Row:
    """A row of the grid, seen from one of its ranks: whose tokens lie where among those of the row."""

    group: Group
    places: Places  # of each rank's valid tokens among the row's
    tokens: int  # physical, T/SP of this rank times ranks: a constant of the run

    @classmethod
    def of(cls, plan: SequencePlan, grid: Group) -> Row:
        assert grid.inner is not None, "StrategyAttention makes the grid"
        inner = grid.inner.size
        return cls(grid.inner, plan.row_places(inner, grid.rank // inner), inner * plan.shard)

    @property
    def valid(self) -> int:
        """Tokens of this rank that are no padding."""
        return self.places.counts[self.group.rank]

    def room(self, like: Tensor, heads: int) -> Tensor:
        """For all tokens of the row, ``[B, T/SP·u, heads, D]``; padding, where there is any, is 0."""
        shape = (like.shape[0], self.tokens, heads, like.shape[3])
        return like.new_empty(shape) if sum(self.places.counts) == self.tokens else like.new_zeros(shape)

    def swap(self, parts: dict[int, Tensor], heads: Sequence[int], tokens: Sequence[int]) -> Pending:
        """All-to-all: sends ``parts[r]`` to rank r of the row; expects so many heads of so many tokens of each."""
        first = next(iter(parts.values()), None)
        if first is None:
            return exchange(self.group, [], [])
        shapes = [(first.shape[0], tokens[rank], heads[rank], first.shape[3]) for rank in self.group.others]
        receives = [(rank, first.new_empty(shape)) for rank, shape in zip(self.group.others, shapes, strict=True)]
        return exchange(self.group, list(parts.items()), receives)


def to_heads(q: Tensor, k: Tensor, v: Tensor, row: Row, split: HeadSplit) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[B, T/SP, H, D]``, k and v ``[B, T/SP, Hkv, D]`` to ``[B, T/SP·u, H/u, D]`` and the heads that those read.

    One message per rank of the row: its heads of q, k and v side by side.
    """
    parts = []
    for rank in range(split.ranks):
        keys = split.key_heads(rank)
        parts.append([q[:, : row.valid, split.query_heads(rank)], k[:, : row.valid, keys], v[:, : row.valid, keys]])
    queries, key, value = _gather_tokens(row, parts)
    copies = split.copies(row.group.rank)
    if copies is not None:
        key, value = key[:, :, copies], value[:, :, copies]
    return queries, key, value


def to_heads_adjoint(
    dq: Tensor, dk: Tensor, dv: Tensor, row: Row, split: HeadSplit, shard: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``to_heads``' outputs to those of its inputs; those of shared key/value heads are summed."""
    me, dtype = row.group.rank, dq.dtype
    copies = split.copies(me)
    if copies is not None:
        dk, dv = (_sum_copies(grad, copies, split.keys(me)) for grad in (dk, dv))
    shared = sum(split.keys(rank) for rank in range(split.ranks)) > split.kv_heads
    wide = accumulation_dtype(dtype) if shared else dtype
    own_dq = _shard(dq, row, shard, split.heads, dtype, shared)
    own_dk, own_dv = (_shard(dq, row, shard, split.kv_heads, wide, shared) for _ in range(2))
    rooms = []
    for rank in range(split.ranks):
        keys = split.key_heads(rank)
        heads = ((own_dq, split.query_heads(rank)), (own_dk, keys), (own_dv, keys))
        rooms.append([whole[:, : row.valid, some] for whole, some in heads])
    _scatter_tokens(row, (dq, dk, dv), rooms, shared)
    return own_dq, own_dk.to(dtype), own_dv.to(dtype)


def to_tokens(out: Tensor, row: Row, shard: int) -> Tensor:
    """out ``[B, T/SP·u, H/u, D]`` to ``[B, T/SP, H, D]``."""
    ranks, width = row.group.size, out.shape[2]
    whole = _shard(out, row, shard, ranks * width, out.dtype)
    _scatter_tokens(row, (out,), [[part[:, : row.valid]] for part in whole.split(width, dim=2)])
    return whole


def to_tokens_adjoint(dout: Tensor, row: Row) -> Tensor:
    """dout ``[B, T/SP, H, D]`` to ``[B, T/SP·u, H/u, D]``."""
    ranks = row.group.size
    width = dout.shape[2] // ranks
    parts = [[dout[:, : row.valid, rank * width : (rank + 1) * width]] for rank in range(ranks)]
    return _gather_tokens(row, parts)[0]


def _gather_tokens(row: Row, parts: list[list[Tensor]]) -> list[Tensor]:
    """Sends heads of this rank's tokens, ``parts[rank]`` side by side, and puts what arrives in order of position;
    padding is 0. Its own part it puts there while the others travel."""
    own = parts[row.group.rank]
    widths = [piece.shape[2] for piece in own]
    packed = {rank: torch.cat(parts[rank], dim=2) for rank in row.group.others}
    arriving = row.swap(packed, [sum(widths)] * row.group.size, row.places.counts)
    wholes = [row.room(piece, width) for piece, width in zip(own, widths, strict=True)]
    for whole, piece in zip(wholes, own, strict=True):
        row.places.put(row.group.rank, piece, whole)
    for rank, part in zip(row.group.others, arriving.wait(), strict=True):
        for whole, piece in zip(wholes, part.split(widths, dim=2), strict=True):
            row.places.put(rank, piece, whole)
    return wholes


def _scatter_tokens(row: Row, wholes: tuple[Tensor, ...], rooms: list[list[Tensor]], sums: bool = False) -> None:
    """Sends each rank its tokens of ``wholes``, side by side; what comes of this rank's tokens goes to ``rooms[rank]``.

    Its own part it puts there first, while the others travel; they are added where rooms overlap (``sums``).
    """
    me, widths = row.group.rank, [[room.shape[2] for room in some] for some in rooms]
    packed = {rank: _picked(wholes, row.places, rank) for rank in row.group.others}
    arriving = row.swap(packed, [sum(some) for some in widths], [row.valid] * row.group.size)
    for whole, room in zip(wholes, rooms[me], strict=True):
        row.places.pick(me, whole, room)
    for rank, part in zip(row.group.others, arriving.wait(), strict=True):
        for room, piece in zip(rooms[rank], part.split(widths[rank], dim=2), strict=True):
            if sums:
                room.add_(piece)
            else:
                room.copy_(piece)


def _picked(wholes: tuple[Tensor, ...], places: Places, rank: int) -> Tensor:
    """The rank's tokens, of all tensors side by side."""
    batch, _, _, dim = wholes[0].shape
    widths = [whole.shape[2] for whole in wholes]
    packed = wholes[0].new_empty(batch, places.counts[rank], sum(widths), dim)
    for whole, room in zip(wholes, packed.split(widths, dim=2), strict=True):
        places.pick(rank, whole, room)
    return packed


def _shard(like: Tensor, row: Row, shard: int, heads: int, dtype: torch.dtype, sums: bool = False) -> Tensor:
    """This rank's tokens, ``[B, T/SP, heads, D]``: zeros where there is padding or where it ``sums``."""
    shape, full = (like.shape[0], shard, heads, like.shape[3]), row.valid == shard
    return like.new_empty(shape, dtype=dtype) if full and not sums else like.new_zeros(shape, dtype=dtype)


def _sum_copies(grad: Tensor, copies: list[int], heads: int) -> Tensor:
    total = grad.new_zeros(*grad.shape[:2], heads, grad.shape[3], dtype=accumulation_dtype(grad.dtype))
    total.index_add_(2, torch.tensor(copies, device=grad.device), grad.to(total.dtype))
    return total.to(grad.dtype)


_CONTEXT = "Tensor plan, str group"


def _row(plan: Tensor, group: str) -> Row:
    return Row.of(plan_of(plan), group_named(group))


def _run_to_heads(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    require_fit(q, plan_of(plan), group_named(group))
    row = _row(plan, group)
    return to_heads(q, k, v, row, HeadSplit(q.shape[2], k.shape[2], row.group.size))


def _run_to_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, plan: Tensor, group: str, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    row = _row(plan, group)
    split = HeadSplit(dq.shape[2] * row.group.size, kv_heads, row.group.size)
    return to_heads_adjoint(dq, dk, dv, row, split, plan_of(plan).shard)


def _run_to_tokens(out: Tensor, plan: Tensor, group: str) -> Tensor:
    return to_tokens(out, _row(plan, group), plan_of(plan).shard)


def _run_to_tokens_backward(dout: Tensor, plan: Tensor, group: str) -> Tensor:
    return to_tokens_adjoint(dout, _row(plan, group))


def _run_joined(plan: Tensor, group: str) -> Tensor:
    return plan_of(plan).joined(_inner(group).size).handle.clone()


_to_heads = register(
    "to_heads", _run_to_heads, f"(Tensor q, Tensor k, Tensor v, {_CONTEXT}) -> (Tensor, Tensor, Tensor)"
)
_to_heads_backward = register(
    "to_heads_backward",
    _run_to_heads_backward,
    f"(Tensor dq, Tensor dk, Tensor dv, {_CONTEXT}, int kv_heads) -> (Tensor, Tensor, Tensor)",
)
_to_tokens = register("to_tokens", _run_to_tokens, f"(Tensor out, {_CONTEXT}) -> Tensor")
_to_tokens_backward = register("to_tokens_backward", _run_to_tokens_backward, f"(Tensor dout, {_CONTEXT}) -> Tensor")
_joined = register("joined_plan", _run_joined, f"({_CONTEXT}) -> Tensor")


OPERATORS = tuple(made._opoverload for made in (_to_heads, _to_heads_backward, _to_tokens, _to_tokens_backward))


def _inner(group: str) -> Group:
    inner = group_named(group).inner
    assert inner is not None, "StrategyAttention makes the grid"
    return inner


@_to_heads.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    inner = _inner(group)
    split = HeadSplit(q.shape[2], k.shape[2], inner.size)
    shape, dim = (q.shape[0], q.shape[1] * inner.size), q.shape[3]
    keys = (*shape, split.local_keys(inner.rank), dim)
    return q.new_empty(*shape, split.queries, dim), k.new_empty(keys), v.new_empty(keys)


@_to_heads_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, plan: Tensor, group: str, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    ranks = _inner(group).size
    shape, dim = (dq.shape[0], dq.shape[1] // ranks), dq.shape[3]
    keys = (*shape, kv_heads, dim)
    return dq.new_empty(*shape, dq.shape[2] * ranks, dim), dk.new_empty(keys), dv.new_empty(keys)


@_to_tokens.register_fake
def _(out: Tensor, plan: Tensor, group: str) -> Tensor:
    ranks = _inner(group).size
    return out.new_empty(out.shape[0], out.shape[1] // ranks, out.shape[2] * ranks, out.shape[3])


@_to_tokens_backward.register_fake
def _(dout: Tensor, plan: Tensor, group: str) -> Tensor:
    ranks = _inner(group).size
    return dout.new_empty(dout.shape[0], dout.shape[1] * ranks, dout.shape[2] // ranks, dout.shape[3])


@_joined.register_fake
def _(plan: Tensor, group: str) -> Tensor:
    return plan.new_empty(())


def _remember_heads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, k, _, plan, ctx.group = inputs
    ctx.kv_heads = k.shape[2]
    ctx.save_for_backward(plan)


def _differentiate_heads(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    (plan,) = ctx.saved_tensors
    return (*_to_heads_backward(dq, dk, dv, plan, ctx.group, ctx.kv_heads), None, None)


def _remember_tokens(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, plan, ctx.group = inputs
    ctx.save_for_backward(plan)


def _differentiate_tokens(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    (plan,) = ctx.saved_tensors
    return _to_tokens_backward(dout, plan, ctx.group), None, None


_to_heads.register_autograd(_differentiate_heads, setup_context=_remember_heads)
_to_tokens.register_autograd(_differentiate_tokens, setup_context=_remember_tokens)


def swapped(attend: Attend) -> Attend:
    """``attend`` over the columns of a grid, whose rows swap tokens for heads before and after it.

    The lse that it returns is of the row's tokens and this rank's heads.
    """

    def attend_in_rows(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, *names: Any) -> tuple[Tensor, Tensor]:
        # Compiled code goes through here: groups stay names until an operator asks for them.
        queries, keys, values = _to_heads(q, k, v, plan, group)
        row_plan = _joined(plan, group)
        out, lse = attend(queries, keys, values, row_plan, outer_name(group), *names)
        return _to_tokens(out, plan, group), lse

    return attend_in_rows


def work_in_rows(plan: SequencePlan, rank: int, inner: int) -> float:
    """Ranks of a row compute for all its queries, each in its own heads."""
    return plan.joined(inner).work(rank // inner) / inner


def swap_sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """What a rank sends inside its row: its tokens' q, k, v to each rank's heads, and other ranks' tokens home.

    The backward pass sends the adjoints: dout to heads, and dq, dk, dv of other ranks' tokens home.
    """
    inner = sizes.inner
    first, me = rank // inner * inner, rank % inner
    split = HeadSplit(sizes.heads, sizes.kv_heads, inner)
    head = sizes.batch * sizes.head_dim * sizes.element
    queries, mine, own = split.queries, split.queries + 2 * split.keys(me), len(plan.positions(rank))
    sent = []
    for other in range(inner):
        theirs, together = len(plan.positions(first + other)), split.queries + 2 * split.keys(other)
        if other != me and own:
            sent.append((first + other, Volume(head * own * together, head * own * queries, 1, 1)))
        if other != me and theirs:
            sent.append((first + other, Volume(head * theirs * queries, head * theirs * mine, 1, 1)))
    return sent


def in_rows(sizes: Sizes) -> Sizes:
    """The same with as many key/value heads as the ranks of a row hold together, which may share them."""
    split = HeadSplit(sizes.heads, sizes.kv_heads, sizes.inner)
    return replace(sizes, kv_heads=sizes.inner * max(split.local_keys(rank) for rank in range(sizes.inner)))


def swaps_peak(plan: SequencePlan, sizes: Sizes) -> int:
    """Bytes in a forward pass: q, k, v as parts, as they arrive and in order, the rank's own part as it lies; or they
    beside out on its way back to tokens, of which a part may be picked by index."""
    rows, inner, sizes = plan.shard, sizes.inner, in_rows(sizes)
    by_index = not all(plan.row_places(inner, row).in_runs for row in range(plan.world // inner))
    entering = sizes.held(queries=3, keys=3) - sizes.held(queries=2, keys=2) // inner
    leaving = sizes.held(queries=5, sums=1, keys=1) - sizes.held(queries=2 - by_index) // inner
    return rows * max(entering, leaving)
