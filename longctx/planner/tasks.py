"""Assigns rows to servers: runs, which planners produce, and tasks, the mask's cells of these rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.slices import Int64, MaskSlices, Slice, areas


@dataclass(frozen=True)
class TaskRuns:
    """Runs of query rows and the server that computes each: what planners produce, int64 columns ``[N]``.

    Rows ``[start, stop)`` of ``doc`` live on ``home``. ``server`` computes them for its keys in ``[first_key,
    last_key)``. Every run lies within one span of its home.
    """

    doc: Int64
    start: Int64
    stop: Int64
    home: Int64
    server: Int64
    first_key: Int64
    last_key: Int64

    @classmethod
    def at_home(cls, home: DocumentPlacement) -> TaskRuns:
        """Returns runs in which every rank computes the rows that live on it."""
        return cls.of_rows(home.doc, home.start, home.stop, home.rank, home.rank)

    @classmethod
    def between(cls, home: DocumentPlacement, servers: DocumentPlacement) -> TaskRuns:
        """Returns runs that are computed where another layout of the same documents has them."""
        key = servers.table[0]
        first = np.searchsorted(key, home.doc * servers.stride + home.start, "right") - 1
        count = np.searchsorted(key, home.doc * servers.stride + home.stop, "left") - first
        own, other = np.repeat(np.arange(len(home.doc)), count), ranges(first, count)
        _, _, start, stop, rank, _ = servers.table
        begin, end = np.maximum(home.start[own], start[other]), np.minimum(home.stop[own], stop[other])
        return cls.of_rows(home.doc[own], begin, end, home.rank[own], rank[other])

    @classmethod
    def of_rows(cls, doc: Int64, start: Int64, stop: Int64, home: Int64, server: Int64) -> TaskRuns:
        """Returns runs of rows with all their keys."""
        return cls(doc, start, stop, home, server, doc * 0, np.full_like(doc, np.iinfo(np.int64).max))


@dataclass(frozen=True, eq=False)
class Tasks:
    """What servers compute, one mask slice a task, as int64 columns ``[N]``.

    A slice of ``doc`` (``q0 .. hi``), heads ``group``, ``home`` and ``server``.
    """

    doc: Int64
    q0: Int64
    q1: Int64
    k0: Int64
    k1: Int64
    lo: Int64
    hi: Int64
    group: Int64
    home: Int64
    server: Int64

    def __len__(self) -> int:
        return len(self.doc)

    @cached_property
    def area(self) -> Int64:
        return areas(self.q0, self.q1, self.k0, self.k1, self.lo, self.hi)

    @property
    def columns(self) -> tuple[Int64, ...]:
        return (
            self.doc, self.q0, self.q1, self.k0, self.k1, self.lo, self.hi, self.group, self.home, self.server
        )  # fmt: skip

    def part(self, where: Int64) -> Tasks:
        return Tasks(*(column[where] for column in self.columns))

    def trimmed(self) -> Tasks:
        """Returns the same cells in the smallest rectangles."""
        q0, q1, k0, k1 = _trimmed(self.q0, self.q1, self.k0, self.k1, self.lo, self.hi)
        return Tasks(self.doc, q0, q1, k0, k1, self.lo, self.hi, self.group, self.home, self.server)

    def slice(self, task: int) -> Slice:
        return Slice(*(int(column[task]) for column in (self.q0, self.q1, self.k0, self.k1, self.lo, self.hi)))

    @classmethod
    def of_runs(cls, mask: MaskSlices, runs: TaskRuns) -> Tasks:
        """Returns the tasks of runs: every mask slice of every run, one heads group."""
        parts = []
        for number in range(mask.per_doc):
            q0, q1, k0, k1, lo, hi = mask.clipped(number, runs.doc, runs.start, runs.stop)
            k0, k1 = np.maximum(k0, runs.first_key), np.minimum(k1, runs.last_key)
            parts.append((runs.doc, *_trimmed(q0, q1, k0, k1, lo, hi), lo, hi, runs.doc * 0, runs.home, runs.server))
        columns = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        alive = (columns[2] > columns[1]) & (columns[4] > columns[3])
        return cls(*(columns if alive.all() else [column[alive] for column in columns]))


def _trimmed(q0: Int64, q1: Int64, k0: Int64, k1: Int64, lo: Int64, hi: Int64) -> tuple[Int64, ...]:
    """``Slice.trimmed`` of many."""
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    return np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo), k0, k1


def ranges(first: Int64, count: Int64) -> Int64:
    """Returns ``first[i], first[i] + 1, ..`` of ``count[i]`` numbers each, one after another."""
    before = np.cumsum(count) - count
    return np.asarray(np.repeat(first - before, count) + np.arange(int(count.sum()), dtype=np.int64))
