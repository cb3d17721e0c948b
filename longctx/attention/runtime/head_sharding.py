"""Swapping axes inside a row of ranks: from some tokens with all heads to all tokens with some heads, and back.

Tokens of a row arrive in order of position, as its joined plan (``SequencePlan.joined``) has them, so that layouts,
documents and windows are whatever that plan says. ``runtime.all_to_all`` computes attention in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import Group, Pending, exchange
from longctx.sequence import Places, SequencePlan


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


GROUPS = 2  # of a rank's heads: while one computes, the next comes and the one before goes home


@dataclass(frozen=True)
class HeadGroups:
    """The heads of each of ``ranks`` in ``count`` groups; ``split``: among ranks and groups alike."""

    ranks: int
    count: int
    split: HeadSplit

    @classmethod
    def of(cls, heads: int, kv_heads: int, ranks: int) -> HeadGroups:
        """As many groups as there may be without sending a key/value head to one rank twice."""
        # Every call of attention asks. The compiler may ask for symbols, and heads are none.
        return cls._of(int(heads), int(kv_heads), ranks)

    @classmethod
    @lru_cache(maxsize=64)
    def _of(cls, heads: int, kv_heads: int, ranks: int) -> HeadGroups:

        def split(count: int) -> HeadSplit:
            return HeadSplit(heads, kv_heads, ranks * count)

        def once(count: int) -> bool:
            return heads % (ranks * count) == 0 and all(
                sum(split(count).keys(rank * count + group) for group in range(count)) == split(1).keys(rank)
                for rank in range(ranks)
            )

        count = next(count for count in range(GROUPS, 0, -1) if count == 1 or once(count))
        return cls(ranks, count, split(count))

    def part(self, rank: int, group: int) -> int:
        """The number of a rank's group in ``split``."""
        return rank * self.count + group

    def heads(self, rank: int, group: int) -> slice:
        """Query heads of a rank's group."""
        return self.split.query_heads(self.part(rank, group))

    @property
    def shared(self) -> bool:
        """Do ranks share key/value heads?"""
        return sum(map(self.split.keys, range(self.split.ranks))) > self.split.kv_heads


@dataclass(frozen=True)
class GridRow:
    """A row of the grid, seen from one of its ranks: whose tokens lie where among those of the row."""

    group: Group
    places: Places  # of each rank's valid tokens among the row's
    tokens: int  # physical, T/SP of this rank times ranks: a constant of the run

    @classmethod
    def of(cls, plan: SequencePlan, grid: Group) -> GridRow:
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


class ToHeads:
    """Heads of the row's tokens on their way to the ranks that compute them, one message per rank.

    ``parts[rank]``: this rank's tokens in that rank's heads, of one tensor or of several, ``[B, valid, heads, D]``.
    """

    def __init__(self, row: GridRow, parts: list[list[Tensor]]) -> None:
        self._row, self._own = row, parts[row.group.rank]
        self._widths = [piece.shape[2] for piece in self._own]
        packed = {rank: torch.cat(parts[rank], dim=2) for rank in row.group.others}
        self._pending = row.swap(packed, [sum(self._widths)] * row.group.size, row.places.counts)

    def wait(self) -> list[Tensor]:
        """Each tensor of the row's tokens in order of position, ``[B, T/SP·u, heads, D]``; padding is 0."""
        row = self._row
        wholes = [row.room(piece, width) for piece, width in zip(self._own, self._widths, strict=True)]
        for whole, piece in zip(wholes, self._own, strict=True):
            row.places.put(row.group.rank, piece, whole)
        for rank, part in zip(row.group.others, self._pending.wait(), strict=True):
            for whole, piece in zip(wholes, part.split(self._widths, dim=2), strict=True):
                row.places.put(rank, piece, whole)
        return wholes


class ToTokens:
    """The way back: tokens of ``wholes``, ``[B, T/SP·u, heads, D]`` each, on their way to the ranks they live on.

    What comes of this rank's tokens goes to ``rooms[rank]``, views of whole tensors of all heads. Where rooms overlap
    it is added (``sums``), this rank's own first and then in the order of ranks.
    """

    def __init__(self, row: GridRow, wholes: tuple[Tensor, ...], rooms: list[list[Tensor]], sums: bool = False) -> None:
        self._row, self._rooms, self._sums = row, rooms, sums
        me, self._widths = row.group.rank, [[room.shape[2] for room in some] for some in rooms]
        packed = {rank: _picked(wholes, row.places, rank) for rank in row.group.others}
        self._pending = row.swap(packed, [sum(some) for some in self._widths], [row.valid] * row.group.size)
        if sums:
            self._add(me, _picked(wholes, row.places, me))
        else:
            for whole, room in zip(wholes, rooms[me], strict=True):
                row.places.pick(me, whole, room)

    def wait(self) -> None:
        for rank, part in zip(self._row.group.others, self._pending.wait(), strict=True):
            self._add(rank, part)

    def _add(self, rank: int, part: Tensor) -> None:
        for room, piece in zip(self._rooms[rank], part.split(self._widths[rank], dim=2), strict=True):
            if self._sums:
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


def sum_copies(grad: Tensor, copies: list[int], heads: int) -> Tensor:
    total = grad.new_zeros(*grad.shape[:2], heads, grad.shape[3], dtype=accumulation_dtype(grad.dtype))
    total.index_add_(2, torch.tensor(copies, device=grad.device), grad.to(total.dtype))
    return total.to(grad.dtype)


def work_in_rows(plan: SequencePlan, rank: int, inner: int) -> float:
    """Ranks of a row compute for all its queries, each in its own heads."""
    return plan.joined(inner).work(rank // inner) / inner
