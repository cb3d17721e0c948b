"""Tiles: the exact pieces of (query, key) cells that a kernel must compute, without masked-out work.

Every query sees one interval of global positions (its document, cut by the mask's band). Because a rank's keys ascend,
that interval is one interval of *local* key indices as well, under any layout. Runs of queries whose interval ends
stand still or advance by one key per query are one tile. So a striped shard's causal mask, a sliding window, or a
document edge in the middle of a shard are all one case.

A tile is of one document. Kernels multiply what its diagonals hide by 0, and 0 times a number that is none is none: so
a document that has gone to infinity would otherwise reach its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longctx.sequence.documents import Int64
from longctx.sequence.rows import Rows


@dataclass(frozen=True, slots=True)
class Tile:
    """Describes local queries against a range of local keys, cut by up to two diagonals.

    Queries are ``[q_start, q_stop)``, keys ``[k_start, k_stop)``. With i the query's index in the tile: it sees keys
    from ``k_start + (i if lower else 0)`` up to, and not including, ``k_stop - (n_queries - 1 - i if upper else 0)``;
    never an empty range. ``upper`` alone is a causal mask aligned bottom-right, both together a sliding window.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lower: bool = False
    upper: bool = False

    @property
    def queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def first_keys(self) -> int:
        """Returns how many keys the first query sees."""
        return self.keys - (self.queries - 1 if self.upper else 0)

    @property
    def band(self) -> tuple[int | None, int | None]:
        """Returns (lo, hi) such that query i sees key j of the tile where ``lo <= j - i <= hi``; None: no limit."""
        return (0 if self.lower else None), (self.first_keys - 1 if self.upper else None)

    @property
    def cells(self) -> int:
        """Returns how many (query, key) cells are visible."""
        slope = int(self.upper) - int(self.lower)
        return self.queries * self.first_keys + slope * self.queries * (self.queries - 1) // 2


@dataclass(frozen=True, slots=True)
class TileSet:
    """Holds the tiles of batch rows ``[batch_start, batch_stop)``, which share their structure."""

    batch_start: int
    batch_stop: int
    tiles: tuple[Tile, ...]

    @property
    def cells(self) -> int:
        return (self.batch_stop - self.batch_start) * sum(tile.cells for tile in self.tiles)


def tiles_of(start: Int64, stop: Int64, keys: Int64, document: Int64) -> tuple[Tile, ...]:
    """Returns the tiles of queries that see global key positions ``[start, stop)``, over a rank's keys.

    ``start``, ``stop``: int64 ``[n_queries]``, one interval per local query. ``keys``: int64 ``[n_keys]``,
    the ascending global positions of the key shard. ``document``: which one each query belongs to, by any number. Empty
    intervals produce nothing.
    """
    first = np.searchsorted(keys, start)
    last = np.searchsorted(keys, stop)
    rows = np.flatnonzero(last > first)
    return tiles_of_rows(rows, first[rows], last[rows], document[rows])


def tiles_of_rows(rows: Int64, first: Int64, last: Int64, document: Int64) -> tuple[Tile, ...]:
    """Returns the tiles of query ``rows[i]`` against the keys ``[first[i], last[i])`` of a buffer, never an empty one.

    A row may come more than once, for keys of different stretches. ``document``: which one each of them belongs to.
    """
    return tuple(
        Tile(
            int(rows[i]),
            int(rows[j - 1]) + 1,
            int(first[i]),
            int(last[j - 1]),
            bool(j - i > 1 and first[i + 1] > first[i]),
            bool(j - i > 1 and last[i + 1] > last[i]),
        )
        for i, j in _runs(rows, first, last, document)
    )


def _runs(rows: Int64, first: Int64, last: Int64, document: Int64) -> Iterator[tuple[int, int]]:
    """Maximal half-open runs of one document's rows whose interval ends both move with one slope, 0 or 1, per row."""
    d_first, d_last = np.diff(first), np.diff(last)
    broken = (
        (np.diff(rows) != 1) | (np.diff(document) != 0) | (d_first < 0) | (d_first > 1) | (d_last < 0) | (d_last > 1)
    )
    slope = np.where(broken, -1, 2 * d_first + d_last)  # of the step from row i to row i + 1
    ends = np.append(np.flatnonzero(np.diff(slope)) + 1, len(slope))  # of each stretch of equal steps
    begin = 0
    while begin < len(rows):
        if begin == len(rows) - 1 or slope[begin] < 0:
            end = begin + 1
        else:
            end = int(ends[np.searchsorted(ends, begin, side="right")]) + 1
        yield begin, end
        begin = end


def key_intervals(start: Int64, stop: Int64) -> list[tuple[int, int]]:
    """Returns the union of the half-open intervals ``[start, stop)`` as sorted, disjoint, non-touching ones."""
    alive = stop > start
    if not alive.any():
        return []
    order = np.argsort(start[alive], kind="stable")
    start, reach = start[alive][order], np.maximum.accumulate(stop[alive][order])
    opens = np.append(True, start[1:] > reach[:-1])
    closes = np.append(opens[1:], True)
    return list(zip(start[opens].tolist(), reach[closes].tolist(), strict=True))


def group_rows(per_row: Sequence[tuple[Tile, ...]]) -> tuple[TileSet, ...]:
    """Returns tile sets of consecutive batch rows with equal tiles; rows without tiles are left out."""
    sets: list[TileSet] = []
    for row, tiles in enumerate(per_row):
        if sets and sets[-1].batch_stop == row and sets[-1].tiles == tiles:
            sets[-1] = TileSet(sets[-1].batch_start, row + 1, tiles)
        elif tiles:
            sets.append(TileSet(row, row + 1, tiles))
    return tuple(sets)


def query_rows(tile_sets: Sequence[TileSet]) -> Rows:
    """Returns the query rows that any of the tiles has, united over the batch."""
    return Rows.union((tile.q_start, tile.q_stop) for tiles in tile_sets for tile in tiles.tiles)


def renumber_queries(tile_sets: Sequence[TileSet], rows: Rows) -> tuple[TileSet, ...]:
    """Returns the same tiles over a packed buffer that holds only ``rows`` of the query shard."""

    def moved(tile: Tile) -> Tile:
        start = rows.locate(tile.q_start, tile.q_stop)
        return replace(tile, q_start=start, q_stop=start + tile.queries)

    return tuple(replace(tiles, tiles=tuple(moved(tile) for tile in tiles.tiles)) for tiles in tile_sets)


def renumber_keys(tile_sets: Sequence[TileSet], rows: Rows) -> tuple[TileSet, ...]:
    """Returns the same tiles over a packed buffer that holds only ``rows`` of the key shard."""

    def moved(tile: Tile) -> Tile:
        start = rows.locate(tile.k_start, tile.k_stop)
        return replace(tile, k_start=start, k_stop=start + tile.keys)

    return tuple(replace(tiles, tiles=tuple(moved(tile) for tile in tiles.tiles)) for tiles in tile_sets)
