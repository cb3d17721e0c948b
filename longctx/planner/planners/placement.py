"""Places shipped query rows on servers: the second half of ``cad``."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.options import PlannerOptions
from longctx.planner.slices import Int64, MaskSlices


@dataclass(frozen=True, slots=True)
class RowRun:
    """A run of rows ``[start, stop)`` of document ``doc`` that live on ``home`` and have ``area`` cells."""

    doc: int
    start: int
    stop: int
    home: int
    area: int


def cut_rows(mask: MaskSlices, run: tuple[int, int, int], cells: int, block: int, over: bool) -> int:
    """Returns the first row such that the rows from it to the end of ``run`` (doc, start, stop) hold ``cells``.

    It cuts in whole blocks from the run's end, the last of them over or under. It is the run's start where the run
    holds no more.
    """
    doc, start, stop = run
    if mask.causal:
        edge = 2 * stop + 1
        rows = (edge - isqrt(max(0, edge * edge - 8 * cells))) // 2
    else:
        rows, high = 0, stop - start
        while rows < high:
            middle = (rows + high + 1) // 2
            rows, high = (middle, high) if mask.rows_area(doc, stop - middle, stop) <= cells else (rows, middle - 1)
    # The estimate is within a row; blocks may still tip it either way.
    blocks = min(rows, stop - start) // block
    while blocks and mask.rows_area(doc, stop - blocks * block, stop) > cells:
        blocks -= 1
    while blocks * block < stop - start:
        begin = max(start, stop - (blocks + 1) * block)
        area = mask.rows_area(doc, begin, stop)
        if area > cells and not (over and mask.rows_area(doc, stop - blocks * block, stop) < cells):
            break
        blocks += 1
    return max(start, stop - blocks * block)


class RunPlacement:
    """Assigns shipped rows to servers by the capacity that each has left.

    Documents go by what they ship, most first. A document goes whole to the smallest capacity that takes it, or fills
    the largest. Its other homes, which hold part of its KV, come first. Where its rows read a long prefix, several
    servers share one: each takes all of a band's rows, but a part of their keys. That divides the KV sent by the
    servers that share and multiplies the band's query rows, which the ``spare`` egress of their homes allows.
    """

    def __init__(
        self,
        home: DocumentPlacement,
        mask: MaskSlices,
        capacity: Int64,
        spare: list[int],
        options: PlannerOptions,
        ways: int,
    ) -> None:
        """``capacity``: cells that each server may take, ``[W]``. ``spare``: query rows that each rank may send again.

        ``ways``: servers that may share a band's keys, 1 for none.
        """
        self.home, self.mask, self.options, self.spare = home, mask, options, spare
        self.ways = min(ways, home.ranks) if mask.causal else 1
        self.free = capacity.tolist()
        self.capacities = sorted((cells, rank) for rank, cells in enumerate(self.free))
        self.placed: list[tuple[RowRun, int, int, int]] = []

    def place(self, shipped: Sequence[RowRun]) -> list[tuple[RowRun, int, int, int]]:
        """Returns (run, server, first key, last key) of everything shipped."""
        by_doc: dict[int, list[RowRun]] = defaultdict(list)
        for run in shipped:
            by_doc[run.doc].append(run)
        near = self._near(list(by_doc))
        for doc, runs in sorted(by_doc.items(), key=lambda item: (-sum(run.area for run in item[1]), item[0])):
            left = sorted(runs, key=lambda run: run.start)
            total = sum(run.area for run in left)
            while left:
                shared = self._share(left) if total > self.capacities[-1][0] else 0
                total -= shared or self._fill(left, self._choose(near[doc], total))
        return self.placed

    def _near(self, docs: list[int]) -> dict[int, list[int]]:
        """Returns the ranks on which each document lives."""
        near: dict[int, list[int]] = defaultdict(list)
        parts = np.flatnonzero(np.isin(self.home.doc, docs))
        for doc, rank in zip(self.home.doc[parts].tolist(), self.home.rank[parts].tolist(), strict=True):
            if rank not in near[doc]:
                near[doc].append(rank)
        return near

    def _choose(self, near: list[int], total: int) -> int:
        fitting = [rank for rank in near if self.free[rank] >= total]
        if fitting:
            return min(fitting, key=lambda rank: (self.free[rank], rank))
        at = bisect_left(self.capacities, (total, -1))
        return self.capacities[min(at, len(self.capacities) - 1)][1]

    def _put(self, run: RowRun, server: int, keys: tuple[int, int] | None = None, area: int | None = None) -> None:
        self.placed.append((run, server, *(keys or (0, self.home.stride))))
        self.capacities.pop(bisect_left(self.capacities, (self.free[server], server)))
        self.free[server] -= run.area if area is None else area
        insort(self.capacities, (self.free[server], server))

    def _fill(self, left: list[RowRun], server: int) -> int:
        """Puts the last rows of ``left`` on ``server`` and returns their cells."""
        taken = self._take(left, self.free[server])
        if not taken:  # not one block fits anywhere: where the granularity ends
            taken = [self._split(left.pop(), left, -1)]
            own = taken[0].home
            server = own if self.free[own] >= self.free[server] else server
        for run in taken:
            self._put(run, server)
        return sum(run.area for run in taken)

    def _take(self, left: list[RowRun], capacity: int) -> list[RowRun]:
        """Takes rows from the end of ``left``, latest first, while they fit."""
        taken: list[RowRun] = []
        while left and capacity > 0:
            run = left.pop()
            if run.area > capacity:
                at = cut_rows(self.mask, (run.doc, run.start, run.stop), capacity, self.options.block, over=False)
                if at < run.stop:
                    taken.append(self._split(run, left, at))
                else:
                    left.append(run)
                break
            taken.append(run)
            capacity -= run.area
        return taken

    def _split(self, run: RowRun, left: list[RowRun], at: int) -> RowRun:
        """Returns the run from ``at`` on (-1: its last block); what is before goes back to ``left``."""
        at = at if at >= 0 else max(run.start, run.stop - self.options.block)
        upper = RowRun(run.doc, at, run.stop, run.home, self.mask.rows_area(run.doc, at, run.stop))
        if at > run.start:
            left.append(RowRun(run.doc, run.start, at, run.home, run.area - upper.area))
        return upper

    def _share(self, left: list[RowRun]) -> int:
        """Puts the last rows of ``left`` on several servers with the largest capacities, divided by keys.

        It returns their cells, 0 without gain.
        """
        ways, last = self.ways, left[-1]
        if ways < 2:
            return 0
        servers, widths = self.capacities[-ways:], self.options.widths
        capacity = servers[0][0]  # of the smallest of them, so that each takes the same share
        # Servers with a band each cost g q + E; with shared rows g q ways + E / ways.
        if capacity <= 0 or last.stop**2 <= ways * (2 * widths.row / widths.kv) * capacity:
            return 0
        band = min(last.stop - last.start, capacity * ways // last.stop) * (ways - 1)
        if self.spare[last.home] < band:  # before anything is cut for it
            return 0
        before = list(left)
        taken = self._take(left, capacity * ways)
        rows, whole = sum(run.stop - run.start for run in taken), sum(run.area for run in taken)
        needs: dict[int, int] = defaultdict(int)
        for run in taken:
            needs[run.home] += (run.stop - run.start) * (ways - 1)
        edges = [number * whole // (ways * rows) for number in range(ways)] if rows else [0]
        uneven = whole - edges[-1] * rows > capacity or edges[-1] > min((run.start for run in taken), default=0)
        if not rows or uneven or any(self.spare[home] < more for home, more in needs.items()):
            left[:] = before
            return 0
        for home, more in needs.items():
            self.spare[home] -= more
        for number, (_, server) in enumerate(servers):
            keys = (edges[number], edges[number + 1] if number + 1 < ways else self.home.stride)
            for run in taken:
                width = run.stop - run.start
                area = (keys[1] - keys[0]) * width if number + 1 < ways else run.area - keys[0] * width
                self._put(run, server, keys, area)
        return whole
