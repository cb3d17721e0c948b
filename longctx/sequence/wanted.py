"""Rows that servers ask of homes, for all servers at once, by runs of tokens: the cost goes with cuts, not with tokens.

Any rank wants to know what any other will ask of it. Queries of a task are cut where they, or the first or the last
key that they see, pass from one rank's run of tokens to another's; what is true of one query of a piece is true of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from longctx.sequence.documents import Int64
from longctx.sequence.homes import Homes, Runs, ranges, touched
from longctx.sequence.rows import Rows

Intervals = tuple[Int64, Int64]  # first and last + 1 of each


@dataclass(frozen=True)
class Task:
    """Queries at global positions ``[q_start, q_stop)`` of batch row ``row`` against keys ``[k_start, k_stop)``."""

    row: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    server: int


@dataclass(frozen=True)
class Pieces:
    """Queries ``[first, last)`` (numbers) of a task, which one rank holds: int64 columns, by server and task.

    Query n sees keys from ``max(low, n - back)`` up to, and not including, ``min(high, n + ahead + 1)``.
    ``resident``: the server holds these queries and, side by side, all their keys.
    """

    task: Int64
    server: Int64
    first: Int64
    last: Int64
    low: Int64
    high: Int64
    resident: Int64
    back: int
    ahead: int

    @classmethod
    def of(cls, homes: Homes, tasks: Iterable[Task]) -> Pieces:
        """Of tasks of any masks that a homes' batch may have; queries that see nothing are in none."""
        rows = [(t.server, t.row, t.q_start, t.q_stop, t.k_start, t.k_stop) for t in tasks]
        table = np.array(rows, dtype=np.int64).reshape(-1, 6)
        table = table[np.argsort(table[:, 0], kind="stable")]
        server, q_start, q_stop, k_start, k_stop = (table[:, 0], *(table[:, 1] * homes.length + table[:, 2:].T))
        runs = homes.runs
        most = homes.length * len(homes.documents)  # more than any two tokens are apart
        back, ahead = homes.mask.reach(most)
        start, stop = homes.bounds
        task, doc = touched(start, stop, q_start, q_stop)
        begin, end = start[doc], stop[doc]
        low, high = np.maximum(begin, k_start[task]), np.minimum(end, k_stop[task])
        first = np.maximum(np.maximum(begin, q_start[task]), low - ahead)
        last = np.minimum(np.minimum(end, q_stop[task]), high + back)
        alive = np.flatnonzero((first < last) & (low < high))
        task, low, high, first, last = (column[alive] for column in (task, low, high, first, last))
        for shift in {0, *((back,) if back < most else ()), *((-ahead,) if ahead < most else ())}:
            of, first, last = _cut(first, last, runs.start + shift)
            task, low, high = task[of], low[of], high[of]
        first_key, last_key = np.maximum(low, first - back), np.minimum(high, first + ahead + 1) - 1
        rank, of_first, of_last = runs.rank[runs.at(first)], runs.at(first_key), runs.at(last_key)
        own = server[task]
        resident = (rank == own) & (of_first == of_last) & (runs.rank[of_first] == own)
        return cls(task, own, first, last, low, high, resident, back, ahead)

    def of_server(self, server: int) -> Pieces:
        low, high = np.searchsorted(self.server, [server, server + 1])
        columns = (self.task, self.server, self.first, self.last, self.low, self.high, self.resident)
        task, own, first, last, first_key, last_key, resident = (column[low:high] for column in columns)
        return Pieces(task, own, first, last, first_key, last_key, resident, self.back, self.ahead)

    def away(self) -> tuple[Int64, Intervals, Intervals]:
        """(server, queries, the keys that they see) of what is not resident."""
        rest = np.flatnonzero(self.resident == 0)
        first, last, low, high = (column[rest] for column in (self.first, self.last, self.low, self.high))
        keys = np.maximum(low, first - self.back), np.minimum(high, last + self.ahead)
        return self.server[rest], (first, last), keys

    def queries(self, resident: bool) -> list[tuple[Int64, Int64, Int64]]:
        """Of each task: numbers of its queries that are (not) resident, and of the first and last key of each."""
        chosen = np.flatnonzero(self.resident == resident)
        task, first, last = self.task[chosen], self.first[chosen], self.last[chosen]
        number = ranges(first, last - first)
        low, high = (np.repeat(column[chosen], last - first) for column in (self.low, self.high))
        start, stop = np.maximum(low, number - self.back), np.minimum(high, number + self.ahead + 1)
        edges = np.cumsum(last - first)[np.flatnonzero(np.diff(task))]
        return list(zip(*(np.split(column, edges) for column in (number, start, stop)), strict=True))


class Wanted:
    """Which tokens every server asks of every home: the union of what its pieces need."""

    def __init__(self, runs: Runs, world: int, server: Int64, intervals: Intervals) -> None:
        server, first, last = _united(server, *intervals, stride=int(runs.stop.max(initial=0)) + 1)
        of, first, last = _cut(first, last, runs.start)
        at = runs.at(first)
        key = server[of] * world + runs.rank[at]
        order = np.argsort(key, kind="stable")
        self._world, self._key = world, key[order]
        self._number, self._count = first[order], (last - first)[order]
        self._line = (runs.line[at] + first - runs.start[at])[order]
        self._rows: dict[tuple[int, int], Rows] = {}

    def rows(self, server: int, home: int) -> Rows:
        """Those rows of the home's line."""
        if (server, home) not in self._rows:
            part = self._part(server, home)
            start, stop = self._line[part], self._line[part] + self._count[part]
            joined = start[1:] == stop[:-1]
            opens, closes = np.append(True, ~joined)[: len(start)], np.append(~joined, True)[: len(start)]
            self._rows[server, home] = Rows(tuple(zip(start[opens].tolist(), stop[closes].tolist(), strict=True)))
        return self._rows[server, home]

    def numbers(self, server: int, home: int) -> Int64:
        """The same tokens by number, ascending."""
        part = self._part(server, home)
        return ranges(self._number[part], self._count[part])

    def _part(self, server: int, home: int) -> slice:
        key = server * self._world + home
        return slice(*np.searchsorted(self._key, [key, key + 1]).tolist())


def _cut(first: Int64, last: Int64, edges: Int64) -> tuple[Int64, Int64, Int64]:
    """Intervals cut at each of the ascending ``edges`` that lies inside: (which one, first, last) of the parts."""
    begin = np.searchsorted(edges, first, "right")
    count = np.maximum(np.searchsorted(edges, last) - begin, 0)
    of = np.repeat(np.arange(len(first)), count + 1)
    opens = np.cumsum(count + 1) - (count + 1)
    starts = np.empty(len(of), dtype=np.int64)
    inner = np.ones(len(of), dtype=bool)
    inner[opens] = False
    starts[opens], starts[inner] = first, edges[ranges(begin, count)]
    stops = np.append(starts[1:], 0)
    stops[opens + count] = last
    return of, starts, stops


def _united(server: Int64, first: Int64, last: Int64, stride: int) -> tuple[Int64, Int64, Int64]:
    """Overlapping and touching intervals of one server joined, in order of both; no number reaches ``stride``."""
    order = np.argsort(server * stride + first, kind="stable")
    base = (server * stride)[order]
    start, reach = base + first[order], np.maximum.accumulate(base + last[order])
    opens = np.append(True, start[1:] > reach[:-1])[: len(start)]
    closes = np.append(opens[1:], True)[: len(start)]
    return server[order][opens], first[order][opens], (reach - base)[closes]
