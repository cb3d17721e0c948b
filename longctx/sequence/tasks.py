"""Attention cut into tasks that any rank may compute: which tokens each rank needs for those that it serves.

A task is a run of queries of one document against a run of its keys; the mask says which of their cells are visible.
Whoever assigns tasks to servers (``longctx.planner``) only has to see to it that every visible cell is in exactly one
task. All else follows from that and from the layout, which says where tokens are at home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from longctx.sequence.documents import Int64
from longctx.sequence.homes import Homes
from longctx.sequence.plan import Places
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import Tile, TileSet, key_intervals, tiles_of


@dataclass(frozen=True)
class Task:
    """Queries at global positions ``[q_start, q_stop)`` of batch row ``row`` against keys ``[k_start, k_stop)``."""

    row: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    server: int


Asked = tuple[Int64, Int64, Int64]  # of a task: numbers of its queries, and of the first and last key of each


@dataclass(frozen=True)
class Served:
    """What one rank computes. Tokens of all batch rows are numbered in one line, ``[B * T/SP]`` at home.

    ``here``: tiles over the rank's own tokens as they lie, of its queries whose keys are all its own. ``rest``: tiles
    over two buffers, in order of (batch row, position), of all other queries and their keys. ``queries[home]`` and
    ``keys[home]``: rows of each home's line that go into them, this rank's own included; ``query_places`` and
    ``key_places`` say where.
    """

    queries: tuple[Rows, ...]
    keys: tuple[Rows, ...]
    query_places: Places
    key_places: Places
    tokens: tuple[Int64, Int64]  # the rank's own: numbers, and places in its line
    asked: tuple[list[Asked], list[Asked]]  # of ``here`` and ``rest``

    # Only the rank itself asks for its tiles; others want to know no more than which rows to expect.
    @cached_property
    def here(self) -> tuple[TileSet, ...]:
        own, line = self.tokens
        return _tiles(self.asked[0], own, line, own, line)

    @cached_property
    def rest(self) -> tuple[TileSet, ...]:
        return _tiles(self.asked[1], self.query_places.positions, None, self.key_places.positions, None)

    @property
    def cells(self) -> int:
        return sum(tiles.cells for tiles in (*self.here, *self.rest))


class Dispatch:
    """Who serves what of one batch, or of the batches of several groups of ranks, for one pass."""

    def __init__(self, homes: Homes, tasks: tuple[Task, ...]) -> None:
        self.world = homes.world
        self._homes = homes
        self._tasks = [[task for task in tasks if task.server == rank] for rank in range(homes.world)]
        self._served: dict[int, Served] = {}

    def served(self, server: int) -> Served:
        """Worked out at first use; any rank may ask for any other's, whose messages it has to expect."""
        if server not in self._served:
            self._served[server] = self._serve(server)
        return self._served[server]

    def ready(self, rank: int) -> None:
        """Works out all that ``rank`` asks for in a pass: its own tiles, and the rows that it exchanges with others."""
        for server in range(self.world):
            self.served(server)
        _ = self.served(rank).cells  # of its tiles

    def _serve(self, server: int) -> Served:
        own = self._homes.numbers[server]
        here: list[Asked] = []
        rest: list[Asked] = []
        queries: list[Int64] = []
        keys: list[Int64] = []
        for task in self._tasks[server]:
            asked = np.arange(task.q_start, task.q_stop)
            start, stop = self._homes.mask.key_range(asked, self._homes.documents[task.row])
            start, stop = np.maximum(start, task.k_start), np.minimum(stop, task.k_stop)
            seeing = np.flatnonzero(stop > start)
            first = task.row * self._homes.length
            number, start, stop = (part[seeing] + first for part in (asked, start, stop))
            resident = np.isin(number, own) & (_held(own, start, stop) == stop - start)
            here.append((number[resident], start[resident], stop[resident]))
            rest.append((number[~resident], start[~resident], stop[~resident]))
            queries.append(rest[-1][0])
            keys += [np.arange(low, high) for low, high in key_intervals(*rest[-1][1:])]
        asked_of, read_of = self._by_home(queries), self._by_home(keys)
        query_places, key_places = (Places([part for part, _ in found]) for found in (asked_of, read_of))
        return Served(
            queries=tuple(rows for _, rows in asked_of),
            keys=tuple(rows for _, rows in read_of),
            query_places=query_places,
            key_places=key_places,
            tokens=(own, self._homes.lines[server]),
            asked=(here, rest),
        )

    def _by_home(self, numbers: list[Int64]) -> list[tuple[Int64, Rows]]:
        """Of the tokens with these numbers, those of each home, and their rows of its line."""
        wanted = np.unique(np.concatenate(numbers)) if numbers else np.zeros(0, dtype=np.int64)
        found = []
        for own, line in zip(self._homes.numbers, self._homes.lines, strict=True):
            held = np.isin(own, wanted, assume_unique=True)
            found.append((own[held], _rows(line[held])))
        return found


def _held(own: Int64, start: Int64, stop: Int64) -> Int64:
    """How many of the numbers ``[start, stop)`` are among ``own``, which ascend."""
    return np.searchsorted(own, stop) - np.searchsorted(own, start)


def _rows(ascending: Int64) -> Rows:
    if not len(ascending):
        return Rows()
    edges = np.flatnonzero(np.diff(ascending) != 1) + 1
    starts, stops = ascending[np.append(0, edges)], ascending[np.append(edges, len(ascending)) - 1] + 1
    return Rows(tuple(zip(starts.tolist(), stops.tolist(), strict=True)))


def _tiles(
    asked: list[Asked],
    queries: Int64,
    query_line: Int64 | None,
    keys: Int64,
    key_line: Int64 | None,
) -> tuple[TileSet, ...]:
    """Tiles of queries (number, first and last key's) over buffers that hold ``queries`` and ``keys``.

    A line says where in its buffer a token lies, None: at its place in the order. A line has gaps between batch rows,
    which no task spans.
    """
    found = []
    for number, start, stop in asked:
        places = np.searchsorted(queries, number)
        for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
            if not len(run):
                continue
            place = int(places[run[0]])
            down = place if query_line is None else int(query_line[place])
            for tile in tiles_of(start[run], stop[run], keys):
                along = 0 if key_line is None else int(key_line[tile.k_start]) - tile.k_start
                found.append(_moved(tile, down, along))
    return (TileSet(0, 1, tuple(found)),) if found else ()


def _moved(tile: Tile, down: int, along: int) -> Tile:
    return replace(
        tile,
        q_start=tile.q_start + down,
        q_stop=tile.q_stop + down,
        k_start=tile.k_start + along,
        k_stop=tile.k_stop + along,
    )
