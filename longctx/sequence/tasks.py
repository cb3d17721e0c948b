"""Attention cut into tasks that any rank may compute: which tokens each rank needs for those that it serves.

A task is a run of queries of one document against a run of its keys; the mask says which of their cells are visible.
Whoever assigns tasks to servers (``longctx.planner``) only has to see to it that every visible cell is in exactly one
task. All else follows from that and from the layout, which says where tokens are at home.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from longctx.sequence.documents import Int64
from longctx.sequence.homes import Homes
from longctx.sequence.plan import Places
from longctx.sequence.rows import Rows
from longctx.sequence.tiles import Tile, TileSet, tiles_of
from longctx.sequence.wanted import Pieces, Task, Wanted

__all__ = ["Dispatch", "Served", "Task"]


class Served:
    """What one rank computes. Tokens of all batch rows are numbered in one line, ``[B * T/SP]`` at home.

    ``queries[home]`` and ``keys[home]``: rows of each home's line that go into the two buffers of ``rest``, this rank's
    own included.
    """

    def __init__(self, server: int, dispatch: Dispatch) -> None:
        self._server, self._dispatch = server, dispatch
        self.queries = ByHome(server, dispatch.queries)
        self.keys = ByHome(server, dispatch.keys)

    # Only the rank itself asks for the rest; others want to know no more than which rows to expect.
    @cached_property
    def query_places(self) -> Places:
        """Where the rows of each home lie in the buffer of queries, in order of (batch row, position)."""
        return Places([self._dispatch.queries.numbers(self._server, home) for home in range(self._dispatch.world)])

    @cached_property
    def key_places(self) -> Places:
        """And in that of keys."""
        return Places([self._dispatch.keys.numbers(self._server, home) for home in range(self._dispatch.world)])

    @cached_property
    def here(self) -> tuple[TileSet, ...]:
        """Tiles over the rank's own tokens as they lie, of its queries whose keys are all its own."""
        own, line = self._dispatch.homes.numbers[self._server], self._dispatch.homes.lines[self._server]
        return _tiles(self._pieces.queries(resident=True), own, line, own, line)

    @cached_property
    def rest(self) -> tuple[TileSet, ...]:
        """Tiles over two buffers, in order of (batch row, position), of all other queries and their keys."""
        asked = self._pieces.queries(resident=False)
        return _tiles(asked, self.query_places.positions, None, self.key_places.positions, None)

    @property
    def cells(self) -> int:
        return sum(tiles.cells for tiles in (*self.here, *self.rest))

    @property
    def _pieces(self) -> Pieces:
        return self._dispatch.pieces.of_server(self._server)


class ByHome:
    """Rows of the line of each home."""

    def __init__(self, server: int, wanted: Wanted) -> None:
        self._server, self._wanted = server, wanted

    def __getitem__(self, home: int) -> Rows:
        return self._wanted.rows(self._server, home)


class Dispatch:
    """Who serves what of one batch, or of the batches of several groups of ranks, for one pass."""

    def __init__(self, homes: Homes, tasks: tuple[Task, ...]) -> None:
        self.world, self.homes, self._tasks = homes.world, homes, tasks
        self._served: dict[int, Served] = {}

    def served(self, server: int) -> Served:
        """Worked out at first use; any rank may ask for any other's, whose messages it has to expect."""
        if server not in self._served:
            self._served[server] = Served(server, self)
        return self._served[server]

    def ready(self, rank: int) -> None:
        """Works out all that ``rank`` asks for in a pass: its own tiles, and the rows that it exchanges with others."""
        own = self.served(rank)
        for other in range(self.world):
            served = self.served(other)
            _ = own.queries[other], own.keys[other], served.queries[rank], served.keys[rank]
        _ = own.cells  # of its tiles

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces.of(self.homes, self._tasks)

    @cached_property
    def queries(self) -> Wanted:
        """Queries that servers ask of homes."""
        server, queries, _ = self.pieces.away()
        return Wanted(self.homes.runs, self.world, server, queries)

    @cached_property
    def keys(self) -> Wanted:
        """Keys, with their values, that servers ask of homes."""
        server, _, keys = self.pieces.away()
        return Wanted(self.homes.runs, self.world, server, keys)


def _tiles(
    asked: list[tuple[Int64, Int64, Int64]],
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
