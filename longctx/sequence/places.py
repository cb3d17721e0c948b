"""Places of several ranks' tokens in one buffer: of keys that are gathered, and of a row of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.sequence.documents import Int64
from longctx.sequence.plan import SequencePlan
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import TileSet, group_rows, tiles_of
from longctx.sequence.views import view

MOST_RUNS = 8  # copies of whole runs of tokens are quicker than by index, as long as they are few


class Places:
    """Says where tokens of several ranks lie in one buffer, in order of position."""

    def __init__(self, held: Sequence[Int64]) -> None:
        """``held``: ascending global positions, by rank."""
        self.positions = np.sort(np.concatenate(held))
        self.counts = tuple(map(len, held))
        self._by_rank = [np.searchsorted(self.positions, part) for part in held]
        self._runs = [_runs(places) for places in self._by_rank]
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}

    @property
    def in_runs(self) -> bool:
        """Returns whether the tokens of all ranks are copied in runs.

        That takes no memory; by index it takes a copy.
        """
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
    """Describes the keys that a reader gathers.

    ``rows``: of each owner, what the reader sees; ``places``: theirs in one buffer, which ``tiles`` are over.
    """

    rows: tuple[Rows, ...]
    places: Places
    tiles: tuple[TileSet, ...]


@view
def gathered_keys(plan: SequencePlan, reader: int) -> Gathered:
    """Returns all keys that ``reader`` sees, of whatever rank, in one buffer in order of position."""
    rows = tuple(plan.reads(reader, owner) for owner in range(plan.world))
    places = Places([_taken(plan.positions(owner), seen) for owner, seen in enumerate(rows)])
    ranges = [(*plan.key_ranges(reader, row), plan.documents_of(reader, row)) for row in range(len(plan.documents))]
    tiles = group_rows([tiles_of(start, stop, places.positions, document) for start, stop, document in ranges])
    return Gathered(rows, places, tiles)


@view
def row_places(plan: SequencePlan, inner: int, row: int) -> Places:
    """Returns where each rank's tokens lie among those of its row of ``inner`` neighbours."""
    return Places([plan.positions(rank) for rank in range(row * inner, (row + 1) * inner)])


def _taken(positions: Int64, rows: Rows) -> Int64:
    parts = [positions[start:stop] for start, stop in rows.intervals]
    return np.concatenate(parts) if parts else positions[:0]
