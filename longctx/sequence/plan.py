"""Sequence plans: for one batch, which rank holds which tokens, and which tiles their queries and keys make.

A plan is plain data, a pure function of (documents, mask, layout, length, world). It belongs to no rank: strategies ask
it of any rank, or of any pair. What is worked out of it is a view (``longctx.sequence.views``), made at first use and
kept as long as the plan. Here are the tiles and rows that every strategy asks for. Elsewhere are rings
(``ring_schedule``), gathered keys and rows of a grid (``places``), halos, and what other kinds of layers need.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longctx.errors import ConfigError, DataError
from longctx.rules import whole
from longctx.sequence.documents import Documents, Int64
from longctx.sequence.handles import name, named
from longctx.sequence.layout import Joined, Layout, positions_by_rank, shard_length
from longctx.sequence.mask import Mask
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import (
    TileSet,
    group_rows,
    key_intervals,
    query_rows,
    renumber_keys,
    renumber_queries,
    tiles_of,
)
from longctx.sequence.views import view


class SequencePlan:
    """Answers which positions, tiles and rows belong to which rank, for one batch of packed sequences.

    ``documents``: one entry per batch row. ``world``: the ranks that share the sequences. ``length``: tokens of each
    row, padding included. ``shard``: physical tokens per rank, the same for all; valid ones come first. ``handle``:
    int64 scalar tensor on the CPU that names this plan to operators (``sequence.handles``). The plan lives as long as
    somebody holds it, usually the local batch; an autograd graph holds the handle alone. ``views``: what ``view`` has
    made of it.

    A pickled or copied plan is made anew from its arguments where it is read, with a handle of that process. A batch
    that a worker of a data loader has cut is right in the process that trains. ``bound``: why it is not to leave here.
    """

    bound: str | None = None

    def __init__(
        self,
        documents: Sequence[Documents],
        mask: Mask,
        layout: Layout,
        length: int,
        world: int,
        multiple: int = 1,
    ) -> None:
        _require(documents, mask, layout, whole("length of the sequence", length, 0))
        self.documents = tuple(documents)
        self.mask = mask
        self.layout = layout
        self.length = length
        self.world = whole("world", world, 1)
        self._multiple = multiple
        self.shard = shard_length(layout, length, world, multiple)
        self._positions = positions_by_rank(layout, length, world)
        self.views: dict[Any, Any] = {}
        self.handle: Tensor = name(self)
        self.id = int(self.handle)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.bound:
            raise ConfigError(f"a plan of which {self.bound} stays in its process; pickle the documents and plan again")
        arguments = (self.documents, self.mask, self.layout, self.length, self.world, self._multiple)
        return _made_again, (type(self), *arguments)

    def positions(self, rank: int) -> Int64:
        """Returns the global positions of a rank's valid local tokens, int64 ``[n_rank]``, ascending."""
        if rank.__class__ is not int or not 0 <= rank < self.world:
            rank = whole("rank", rank, 0, self.world - 1)
        return self._positions[rank]

    def queries(self, rank: int) -> int:
        """Returns how many of a rank's valid local tokens, the first ones, are queries."""
        return len(self.positions(rank))

    @view
    def key_ranges(self, rank: int, row: int) -> tuple[Int64, Int64]:
        """Returns the first positions, and last + 1, that each of a rank's queries sees in a batch row."""
        asking = self.positions(rank)[: self.queries(rank)]
        return self.mask.key_range(asking, self.documents[row])

    @view
    def documents_of(self, rank: int, row: int) -> Int64:
        """Returns where the document of each of a rank's queries begins in a batch row; padding begins at itself."""
        return self.documents[row].bounds_of(self.positions(rank)[: self.queries(rank)])[0]

    @view
    def tiles(self, q_rank: int, k_rank: int) -> tuple[TileSet, ...]:
        """Returns the tiles of queries of ``q_rank`` against keys of ``k_rank``, in local rows of both."""
        keys, rows = self.positions(k_rank), range(len(self.documents))
        return group_rows(
            [tiles_of(*self.key_ranges(q_rank, row), keys, self.documents_of(q_rank, row)) for row in rows]
        )

    @view
    def packed_tiles(self, q_rank: int, k_rank: int, rows: Rows) -> tuple[TileSet, ...]:
        """Returns ``tiles`` with keys numbered by place in a buffer that holds only ``rows`` of the key shard.

        ``rows`` cover all that the tiles read (``reads``): tiles are renumbered, not cut.
        """
        return renumber_keys(self.tiles(q_rank, k_rank), rows)

    @view
    def visiting_tiles(self, q_rank: int, k_rank: int, rows: Rows) -> tuple[TileSet, ...]:
        """Returns ``tiles`` with queries numbered by place in a buffer that holds only ``rows`` of the query shard.

        ``rows`` cover all queries of the tiles (``sees``).
        """
        return renumber_queries(self.tiles(q_rank, k_rank), rows)

    @view
    def reads(self, reader: int, owner: int) -> Rows:
        """Returns the local rows of ``owner``'s keys that queries of ``reader`` see, united over the batch."""
        keys = self.positions(owner)
        needed: list[tuple[int, int]] = []
        for row in range(len(self.documents)):
            for start, stop in key_intervals(*self.key_ranges(reader, row)):
                low, high = np.searchsorted(keys, (start, stop)).tolist()
                needed.append((low, high))
        return Rows.union(needed)

    def sees(self, owner: int, reader: int) -> Rows:
        """Returns the local rows of ``owner``'s queries that see a key of ``reader``, united over the batch."""
        return query_rows(self.tiles(owner, reader))

    @view
    def joined(self, inner: int) -> SequencePlan:
        """Returns the plan of rows of ``inner`` neighbouring ranks, each seen as one; it lives as long as this one."""
        if self.world % whole("ranks of a row", inner, 1):
            raise ConfigError(f"rows of {inner} ranks do not divide the {self.world} of a plan; take a divisor of it")
        # Physical tokens of a row are those of its ranks: a constant of the run, whatever the lengths.
        layout, multiple = Joined(self.layout, inner), inner * self.shard
        return SequencePlan(self.documents, self.mask, layout, self.length, self.world // inner, multiple)

    @view
    def half(self, number: int) -> SequencePlan:
        """Returns the plan of the first (0) or second (1) half of the batch's sequences.

        It lives as long as this one.
        """
        whole("half of a batch", number, 0, 1)
        count = len(self.documents)
        assert count % 2 == 0, f"{count} sequences have no halves; the configuration refuses them"
        own = self.documents[: count // 2] if number == 0 else self.documents[count // 2 :]
        return SequencePlan(own, self.mask, self.layout, self.length, self.world, self._multiple)

    @view
    def windowed(self, window: int) -> SequencePlan:
        """Returns the plan of the same tokens for layers in which a query sees ``window`` of them.

        It lives as long as this one.
        """
        return SequencePlan(
            self.documents, self.mask.within(window), self.layout, self.length, self.world, self._multiple
        )

    @property
    @view
    def head(self) -> SequencePlan:
        """Returns the plan of the earlier half of each rank's queries, over all keys; it lives as long as this one."""
        return _Head(self.documents, self.mask, self.layout, self.length, self.world, self.shard)

    def work(self, rank: int) -> int:
        """Returns the visible (query, key) cells of the queries that ``rank`` holds, over the whole batch."""
        ranges = [self.key_ranges(rank, row) for row in range(len(self.documents))]
        return int(sum((stop - start).sum() for start, stop in ranges))

    def balance(self) -> float:
        """Returns the attention work of the busiest rank over the mean; 1.0 when there is none."""
        work = [self.work(rank) for rank in range(self.world)]
        return max(work) * self.world / sum(work) if sum(work) else 1.0


class _Head(SequencePlan):
    """A plan whose queries are the earlier half of each rank's tokens; keys are those of all of them."""

    def queries(self, rank: int) -> int:
        return super().queries(rank) // 2


def _require(documents: Sequence[Documents], mask: Mask, layout: Layout, length: int) -> None:
    """Refuses what a plan cannot be made of, and documents that are longer than the sequence."""
    if not isinstance(mask, Mask):
        raise ConfigError(f"mask {mask!r} of a plan must be a Mask, such as Mask() for causal attention")
    if not isinstance(layout, Layout):
        raise ConfigError(f"layout {layout!r} of a plan must be one such as Zigzag(); make_layout makes it of a name")
    if isinstance(documents, Documents) or not all(isinstance(row, Documents) for row in documents):
        raise ConfigError(f"documents {documents!r} of a plan must be a tuple of Documents, one for each batch row")
    for number, row in enumerate(documents):
        if row.length > length:
            raise DataError(
                f"documents of batch row {number} have {row.length} tokens and must fit in its {length}; "
                f"nearest valid: a sequence of {row.length}"
            )


def _made_again(kind: type[SequencePlan], *arguments: Any) -> SequencePlan:
    """The plan of a pickle: one that this process knows already, if it can be."""
    return make_plan(*arguments) if kind is SequencePlan else kind(*arguments)


def named_by(handle: Tensor) -> Any:
    """Returns what a handle names: a plan, or what has one. Raises ConfigError where it names nothing."""
    if not isinstance(handle, Tensor) or handle.dtype != torch.int64 or handle.numel() != 1:
        given = f"{handle.dtype} {tuple(handle.shape)}" if isinstance(handle, Tensor) else type(handle).__name__
        raise ConfigError(f"a plan is given to operators as plan.handle, an int64 scalar tensor; this is {given}")
    found = named(handle)
    if found is None:
        raise ConfigError(
            f"sequence plan {int(handle)} is gone; hold the LocalBatch (or the plan) until backward has run. One of "
            "another process is never here: where a worker cut the batch, take the handle from the LocalBatch it sent"
        )
    return found


def plan_of(handle: Tensor) -> SequencePlan:
    """Returns the plan that a handle names. The handle is on the CPU: reading it waits for no device."""
    found = named_by(handle)
    plan: SequencePlan = found if isinstance(found, SequencePlan) else found.plan
    return plan


def make_plan(
    documents: Sequence[Documents], mask: Mask, layout: Layout, length: int, world: int, multiple: int = 1
) -> SequencePlan:
    """Returns a plan, or the one made before for the same arguments.

    That serves unpacked data, and the ranks of a simulated cluster.
    """
    # Before the cache is asked: to it true is 1, and 2.0 is 2.
    world, multiple = whole("world", world, 1), whole("multiple of the shard's length", multiple, 1)
    _require(documents, mask, layout, whole("length of the sequence", length, 0))
    return known_plan(tuple(documents), mask, layout, int(length), world, multiple)


@lru_cache(maxsize=16)
def known_plan(documents: tuple[Documents, ...], *arguments: Any) -> SequencePlan:
    """Returns the one plan of such arguments."""
    return SequencePlan(documents, *arguments)
