"""One plan per batch: everything that any layer needs to know about the sharded sequence.

A plan is plain data, a pure function of (documents, mask, layout, length, world). It belongs to no rank:
strategies ask it for the tiles of any (query rank, key rank) pair, for the rows that one rank reads of
another, and for positions. Answers are computed at first use and kept.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longctx.errors import ConfigError
from longctx.sequence.documents import Documents, Int64
from longctx.sequence.halo import Halo, plan_halo
from longctx.sequence.layout import Joined, Layout, shard_length
from longctx.sequence.mask import Mask
from longctx.sequence.ring_schedule import RingSchedule, plan_rotation
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

_plans: weakref.WeakValueDictionary[int, SequencePlan] = weakref.WeakValueDictionary()
_ids = itertools.count()
_CPU = torch.device("cpu")


MOST_RUNS = 8  # copies of whole runs of tokens are quicker than by index, as long as they are few


class Places:
    """Where tokens of several ranks lie in one buffer of all, in order of position."""

    def __init__(self, held: Sequence[Int64]) -> None:
        """``held``: ascending global positions, by rank."""
        self.positions = np.sort(np.concatenate(held))
        self.counts = tuple(map(len, held))
        self._by_rank = [np.searchsorted(self.positions, part) for part in held]
        self._runs = [_runs(places) for places in self._by_rank]
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}

    @property
    def in_runs(self) -> bool:
        """Whether whole runs are copied, of any rank, which takes no memory; by index it takes a copy."""
        return None not in self._runs

    def put(self, rank: int, part: Tensor, whole: Tensor, dim: int = 1) -> None:
        """Writes ``part``, the rank's tokens in order along ``dim``, to their places in ``whole``."""
        runs = self._runs[rank]
        if runs is None:
            whole.index_copy_(dim, self._indices(rank, whole.device), part)
            return
        runs.put(whole, part, dim)

    def pick(self, rank: int, whole: Tensor, part: Tensor, dim: int = 1) -> None:
        """Reads the rank's tokens from their places in ``whole`` into ``part``, whose strides and dtype may differ."""
        runs = self._runs[rank]
        if runs is None:
            part.copy_(whole.index_select(dim, self._indices(rank, whole.device)))
            return
        for (start, stop), offset in zip(runs.intervals, runs.offsets, strict=True):
            part.narrow(dim, offset, stop - start).copy_(whole.narrow(dim, start, stop - start))

    def _indices(self, rank: int, device: torch.device) -> Tensor:
        """int64. Moved once, for a copy from ordinary memory makes the host wait."""
        if device not in self._on:
            self._on[device] = tuple(torch.from_numpy(places).to(device) for places in self._by_rank)
        return self._on[device][rank]


def _runs(places: Int64) -> Rows | None:
    """The places as intervals; None if those are many."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    if len(breaks) >= MOST_RUNS:
        return None
    return Rows(tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(places, breaks) if len(part)))


@dataclass(frozen=True)
class Gathered:
    """``rows``: of each owner, what a reader sees; ``places``: theirs in one buffer, which ``tiles`` are over."""

    rows: tuple[Rows, ...]
    places: Places
    tiles: tuple[TileSet, ...]


class SequencePlan:
    """Tiles, positions and traffic of one batch of packed sequences, cut over ``world`` ranks.

    ``documents``: one entry per batch row. ``length``: tokens of each row, padding included.
    ``shard``: physical tokens per rank, the same for all; valid ones come first.
    ``handle``: int64 scalar tensor on the CPU that names this plan to custom operators; a tensor, so that
    pipeline stages can receive it and ``torch.compile`` does not specialize on it. The plan lives as long as
    somebody holds it, usually the local batch; an autograd graph holds the handle alone.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        mask: Mask,
        layout: Layout,
        length: int,
        world: int,
        multiple: int = 1,
    ) -> None:
        assert all(row.length <= length for row in documents), "documents exceed the sequence"
        self.documents = tuple(documents)
        self.mask = mask
        self.layout = layout
        self.length = length
        self.world = world
        self._multiple = multiple
        self.shard = shard_length(layout, length, world, multiple)
        self._positions = [layout.positions(length, world, rank) for rank in range(world)]
        self._ranges: dict[tuple[int, int], tuple[Int64, Int64]] = {}
        self._tiles: dict[tuple[int, int], tuple[TileSet, ...]] = {}
        self._packed: dict[tuple[int, int, Rows], tuple[TileSet, ...]] = {}
        self._visiting: dict[tuple[int, int, Rows], tuple[TileSet, ...]] = {}
        self._reads: dict[tuple[int, int], Rows] = {}
        self._joined: dict[int, SequencePlan] = {}
        self._halves: dict[int, SequencePlan] = {}
        self._gathered: dict[int, Gathered] = {}
        self._row_places: dict[tuple[int, int], Places] = {}
        self._rotations: dict[tuple[str, int], RingSchedule] = {}
        self._head: SequencePlan | None = None
        self._halos: dict[tuple[int, int, torch.device], Halo] = {}
        self.id = next(_ids)
        self.handle: Tensor = torch.tensor(self.id, dtype=torch.int64)
        _plans[self.id] = self

    def positions(self, rank: int) -> Int64:
        """Global positions of a rank's valid local tokens, int64 ``[n_rank]``, ascending."""
        return self._positions[rank]

    def queries(self, rank: int) -> int:
        """Of a rank's valid local tokens, how many ask: the first so many."""
        return len(self._positions[rank])

    def tiles(self, q_rank: int, k_rank: int) -> tuple[TileSet, ...]:
        """What queries of ``q_rank`` owe the keys of ``k_rank``, in local rows of both."""
        pair = (q_rank, k_rank)
        if pair not in self._tiles:
            keys = self._positions[k_rank]
            self._tiles[pair] = group_rows(
                [tiles_of(*self._key_ranges(q_rank, row), keys) for row in range(len(self.documents))]
            )
        return self._tiles[pair]

    def packed_tiles(self, q_rank: int, k_rank: int, rows: Rows) -> tuple[TileSet, ...]:
        """``tiles`` with keys numbered by place in a buffer that holds only ``rows`` of the key shard."""
        key = (q_rank, k_rank, rows)
        if key not in self._packed:
            self._packed[key] = renumber_keys(self.tiles(q_rank, k_rank), rows)
        return self._packed[key]

    def reads(self, reader: int, owner: int) -> Rows:
        """Local rows of ``owner``'s keys that queries of ``reader`` see, united over the batch."""
        pair = (reader, owner)
        if pair not in self._reads:
            keys = self._positions[owner]
            needed: list[tuple[int, int]] = []
            for row in range(len(self.documents)):
                for start, stop in key_intervals(*self._key_ranges(reader, row)):
                    low, high = np.searchsorted(keys, (start, stop)).tolist()
                    needed.append((low, high))
            self._reads[pair] = Rows.union(needed)
        return self._reads[pair]

    def sees(self, owner: int, reader: int) -> Rows:
        """Local rows of ``owner``'s queries that see a key of ``reader``, united over the batch."""
        return query_rows(self.tiles(owner, reader))

    def sees_by_row(self, owner: int, reader: int) -> tuple[tuple[slice, Rows], ...]:
        """``sees`` apart for batch rows that differ; those where no query sees a key are left out."""
        return tuple(
            (slice(tiles.batch_start, tiles.batch_stop), query_rows([tiles])) for tiles in self.tiles(owner, reader)
        )

    def visiting_tiles(self, q_rank: int, k_rank: int, rows: Rows) -> tuple[TileSet, ...]:
        """``tiles`` with queries numbered by place in a buffer that holds only ``rows`` of the query shard."""
        key = (q_rank, k_rank, rows)
        if key not in self._visiting:
            self._visiting[key] = renumber_queries(self.tiles(q_rank, k_rank), rows)
        return self._visiting[key]

    def gathered(self, reader: int) -> Gathered:
        """All keys that ``reader`` sees, of whatever rank, in one buffer in order of position."""
        if reader not in self._gathered:
            rows = tuple(self.reads(reader, owner) for owner in range(self.world))
            held = [_taken(positions, seen) for positions, seen in zip(self._positions, rows, strict=True)]
            places = Places(held)
            ranges = [self._key_ranges(reader, row) for row in range(len(self.documents))]
            tiles = group_rows([tiles_of(start, stop, places.positions) for start, stop in ranges])
            self._gathered[reader] = Gathered(rows, places, tiles)
        return self._gathered[reader]

    def row_places(self, inner: int, row: int) -> Places:
        """Of the tokens of each rank in a row of ``inner`` neighbours, among those of the row."""
        if (inner, row) not in self._row_places:
            self._row_places[inner, row] = Places(self._positions[row * inner : (row + 1) * inner])
        return self._row_places[inner, row]

    def halo(self, reader: int, reach: int, device: torch.device = _CPU) -> Halo:
        """What ``reader`` needs of other ranks to look ``reach`` tokens back."""
        key = (reader, reach, device)
        if key not in self._halos:
            if device == _CPU:
                made = plan_halo(self._positions, self.documents, reader, reach, self.shard)
            else:
                made = self.halo(reader, reach).to(device)
            self._halos[key] = made
        return self._halos[key]

    def joined(self, inner: int) -> SequencePlan:
        """The plan of rows of ``inner`` neighbouring ranks, each seen as one; it lives as long as this one."""
        if inner not in self._joined:
            layout = Joined(self.layout, inner)
            # Physical tokens of a row are those of its ranks: a constant of the run, whatever the lengths.
            multiple = inner * self.shard
            made = SequencePlan(self.documents, self.mask, layout, self.length, self.world // inner, multiple)
            self._joined[inner] = made
        return self._joined[inner]

    def half(self, number: int) -> SequencePlan:
        """The plan of the first (0) or second (1) half of the batch's sequences; it lives as long as this one."""
        if number not in self._halves:
            count = len(self.documents)
            assert count % 2 == 0, f"{count} sequences have no halves; the configuration refuses them"
            own = self.documents[: count // 2] if number == 0 else self.documents[count // 2 :]
            made = SequencePlan(own, self.mask, self.layout, self.length, self.world, self._multiple)
            self._halves[number] = made
        return self._halves[number]

    @property
    def head(self) -> SequencePlan:
        """The plan of the earlier half of each rank's queries, over all keys; it lives as long as this one."""
        if self._head is None:
            self._head = _Head(self.documents, self.mask, self.layout, self.length, self.world, self.shard)
        return self._head

    @property
    def rotation(self) -> RingSchedule:
        """How key/value blocks travel around the ring of all ranks."""
        return self.key_rotation_in(self.world)

    @property
    def query_rotation(self) -> RingSchedule:
        """How blocks of queries travel around the ring of all ranks."""
        return self.query_rotation_in(self.world)

    def key_rotation_in(self, lap: int) -> RingSchedule:
        """How key/value blocks travel around the double ring of rows of ``lap`` ranks."""
        return self._rotation("keys", lap, self.reads)

    def query_rotation_in(self, lap: int) -> RingSchedule:
        """How blocks of queries travel around the double ring of rows of ``lap`` ranks."""
        return self._rotation("queries", lap, lambda reader, owner: self.sees(owner, reader))

    def _rotation(self, what: str, lap: int, reads: Callable[[int, int], Rows]) -> RingSchedule:
        if (what, lap) not in self._rotations:
            shards = [len(positions) for positions in self._positions]
            self._rotations[what, lap] = plan_rotation(reads, shards, lap)
        return self._rotations[what, lap]

    def work(self, rank: int) -> int:
        """Visible (query, key) cells of the queries that ``rank`` holds, over the whole batch."""
        ranges = [self._key_ranges(rank, row) for row in range(len(self.documents))]
        return int(sum((stop - start).sum() for start, stop in ranges))

    def balance(self) -> float:
        """Attention work of the busiest rank over the mean; 1.0 when there is none."""
        work = [self.work(rank) for rank in range(self.world)]
        return max(work) * self.world / sum(work) if sum(work) else 1.0

    def _key_ranges(self, rank: int, row: int) -> tuple[Int64, Int64]:
        if (rank, row) not in self._ranges:
            asking = self._positions[rank][: self.queries(rank)]
            self._ranges[rank, row] = self.mask.key_range(asking, self.documents[row])
        return self._ranges[rank, row]


class _Head(SequencePlan):
    """A plan of which the earlier half of each rank's tokens asks; keys are those of all of them."""

    def queries(self, rank: int) -> int:
        return super().queries(rank) // 2


def _taken(positions: Int64, rows: Rows) -> Int64:
    parts = [positions[start:stop] for start, stop in rows.intervals]
    return np.concatenate(parts) if parts else positions[:0]


def plan_of(handle: Tensor) -> SequencePlan:
    """The plan that a handle names. The handle is on the CPU: reading it waits for no device."""
    plan = _plans.get(int(handle))
    if plan is None:
        raise ConfigError(
            f"sequence plan {int(handle)} is gone; hold the LocalBatch (or the plan) until backward has run"
        )
    return plan


@lru_cache(maxsize=16)
def make_plan(
    documents: tuple[Documents, ...], mask: Mask, layout: Layout, length: int, world: int, multiple: int = 1
) -> SequencePlan:
    """A plan, or the one made before for the same arguments (unpacked data; the ranks of a simulated cluster)."""
    return SequencePlan(documents, mask, layout, length, world, multiple)
