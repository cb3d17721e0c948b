"""A plan: who computes which cells of attention, and what must travel for it, as arrays.

Tasks (query rows of a document against a key range, for a heads group) have a home, where their rows live, and a
server, which computes them. Transfers follow from the tasks and the home layout alone: the union of what a server
reads, so that a token crosses once per (token, server). A plan belongs to no rank; ``rank`` cuts out what one needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longctx.planner.cost import CostReport, Widths
from longctx.planner.home import Home
from longctx.planner.slices import Int64, MaskSlices, Slice, areas


@dataclass(frozen=True)
class Runs:
    """Query rows ``[start, stop)`` of ``doc`` that live on ``home``, computed by ``server`` for its keys in
    ``[first_key, last_key)``: what planners produce, int64 columns ``[N]``. Every run lies within one span of its home.
    """

    doc: Int64
    start: Int64
    stop: Int64
    home: Int64
    server: Int64
    first_key: Int64
    last_key: Int64

    @classmethod
    def at_home(cls, home: Home) -> Runs:
        return cls.of_rows(home.doc, home.start, home.stop, home.rank, home.rank)

    @classmethod
    def between(cls, home: Home, servers: Home) -> Runs:
        """Rows are computed where another layout of the same documents has them."""
        key = servers.table[0]
        first = np.searchsorted(key, home.doc * servers.stride + home.start, "right") - 1
        count = np.searchsorted(key, home.doc * servers.stride + home.stop, "left") - first
        own, other = np.repeat(np.arange(len(home.doc)), count), ranges(first, count)
        _, _, start, stop, rank, _ = servers.table
        begin, end = np.maximum(home.start[own], start[other]), np.minimum(home.stop[own], stop[other])
        return cls.of_rows(home.doc[own], begin, end, home.rank[own], rank[other])

    @classmethod
    def of_rows(cls, doc: Int64, start: Int64, stop: Int64, home: Int64, server: Int64) -> Runs:
        """Rows with all their keys."""
        return cls(doc, start, stop, home, server, doc * 0, np.full_like(doc, np.iinfo(np.int64).max))


@dataclass(frozen=True, eq=False)
class Tasks:
    """Columns int64 ``[N]``: a slice of ``doc`` (``q0 .. hi``), heads ``group``, ``home`` and ``server``."""

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

    def slice(self, task: int) -> Slice:
        return Slice(*(int(column[task]) for column in (self.q0, self.q1, self.k0, self.k1, self.lo, self.hi)))

    @classmethod
    def of_runs(cls, mask: MaskSlices, runs: Runs) -> Tasks:
        """Every mask slice of every run, one heads group."""
        parts = []
        for number in range(mask.per_doc):
            q0, q1, k0, k1, lo, hi = mask.clipped(number, runs.doc, runs.start, runs.stop)
            k0, k1 = np.maximum(k0, runs.first_key), np.minimum(k1, runs.last_key)
            parts.append((runs.doc, *_trimmed(q0, q1, k0, k1, lo, hi), runs.doc * 0, runs.home, runs.server))
        columns = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        alive = (columns[2] > columns[1]) & (columns[4] > columns[3])
        return cls(*(columns if alive.all() else [column[alive] for column in columns]))


def _trimmed(q0: Int64, q1: Int64, k0: Int64, k1: Int64, lo: Int64, hi: Int64) -> tuple[Int64, ...]:
    """``Slice.trimmed`` of many."""
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    return np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo), k0, k1, lo, hi


@dataclass(frozen=True, eq=False)
class Transfers:
    """Tokens ``[start, stop)`` of ``doc`` that ``dest`` reads of ``source``, for heads ``group``: int64 ``[N]`` each.

    ``offset``: place of the first one among the source's resident tokens. Ordered by source, destination, group,
    document and position; with source == destination it stays where it is. No token comes twice to a destination.
    """

    source: Int64
    dest: Int64
    group: Int64
    doc: Int64
    start: Int64
    stop: Int64
    offset: Int64

    @classmethod
    def of(cls, home: Home, dest: Int64, group: Int64, doc: Int64, start: Int64, stop: Int64) -> Transfers:
        """The union of the intervals that each destination reads, cut at the spans of their homes."""
        dest, group, doc, start, stop = _united(dest, group, doc, start, stop, len(home.lengths), home.stride)
        key, _, h_start, h_stop, h_rank, h_offset = home.table
        first = np.searchsorted(key, doc * home.stride + start, "right") - 1
        last = np.searchsorted(key, doc * home.stride + stop, "left")
        count = last - first
        span = ranges(first, count)
        begin = np.maximum(np.repeat(start, count), h_start[span])
        end = np.minimum(np.repeat(stop, count), h_stop[span])
        columns = (
            h_rank[span], np.repeat(dest, count), np.repeat(group, count), np.repeat(doc, count),
            begin, end, h_offset[span] + begin - h_start[span],
        )  # fmt: skip
        # Ordered by destination, group, document and position already; 16 bits let numpy sort by radix.
        narrow = np.int16 if home.ranks <= 32767 else np.int64
        order = np.argsort(columns[0].astype(narrow), kind="stable")
        return cls(*(column[order] for column in columns))

    @property
    def rows(self) -> Int64:
        return self.stop - self.start

    def matrix(self, ranks: int) -> Int64:
        """(token, group) rows from rank to rank, int64 ``[W, W]``, those that stay on the diagonal."""
        flat = np.bincount(self.source * ranks + self.dest, weights=self.rows, minlength=ranks * ranks)
        return np.asarray(flat.astype(np.int64).reshape(ranks, ranks))

    def away(self, ranks: int) -> tuple[Int64, Int64]:
        """Rows that each rank sends to others and receives from others, int64 ``[W]``."""
        moved = np.where(self.source == self.dest, 0, self.rows)
        sent, got = (np.bincount(ends, weights=moved, minlength=ranks) for ends in (self.source, self.dest))
        return sent.astype(np.int64), got.astype(np.int64)

    def part(self, where: Int64) -> Transfers:
        return Transfers(*(column[where] for column in (
            self.source, self.dest, self.group, self.doc, self.start, self.stop, self.offset
        )))  # fmt: skip


def ranges(first: Int64, count: Int64) -> Int64:
    """``first[i], first[i] + 1, ..`` of ``count[i]`` numbers each, one after another."""
    before = np.cumsum(count) - count
    return np.asarray(np.repeat(first - before, count) + np.arange(int(count.sum()), dtype=np.int64))


def _united(
    dest: Int64, group: Int64, doc: Int64, start: Int64, stop: Int64, docs: int, stride: int
) -> tuple[Int64, Int64, Int64, Int64, Int64]:
    """Overlapping and touching intervals of one (destination, group, document) joined; sorted by all."""
    groups = int(group.max(initial=0)) + 1
    base = ((dest * groups + group) * docs + doc) * stride
    order = np.argsort(base + start)
    base, low = base[order], (base + start)[order]
    reach = np.maximum.accumulate(base + stop[order])
    opens = np.append(True, low[1:] > reach[:-1]) if len(low) else np.zeros(0, dtype=bool)
    closes = np.append(opens[1:], True) if len(low) else opens
    pick = order[opens]
    return dest[pick], group[pick], doc[pick], start[pick], reach[closes] - base[opens]


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's side of moving rows to servers: Q with its O on the way back, or K and V.

    ``send``: int64 ``[n]``, resident tokens to send, in order of destination; ``send_group``: their heads groups.
    ``send_counts``, ``recv_counts``: int64 ``[W]``, the split lists, a rank's own rows among them.
    ``order``: int64 ``[m]``; received rows taken in this order lie by heads group, document and position.
    """

    send: Int64
    send_group: Int64
    send_counts: Int64
    recv_counts: Int64
    order: Int64


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank's executor needs; it sends as a home and computes as a server.

    Forward: send Q and KV rows by ``q`` and ``kv``, put the received ones in ``order``; task i computes queries
    ``[q_start, q_stop)`` against keys ``[k_start, k_stop)`` of those buffers, cell (i, j) counted from their starts
    visible where ``lo <= j - i <= hi``. Partials of one row are merged on the server in order of the tasks, return
    by the transposed counts (undo ``order``), and a home merges what it gets of one row in order of the servers:
    row j of the returned buffer belongs to resident token ``q.send[j]``, heads group ``q.send_group[j]``.
    """

    tokens: int
    q: Exchange
    kv: Exchange
    group: Int64
    q_start: Int64
    q_stop: Int64
    k_start: Int64
    k_stop: Int64
    lo: Int64
    hi: Int64


class Plan:
    """Tasks and transfers for all ranks of ``home``; every rank is a server too. ``name``: the planner's.

    ``groups``: heads groups, equal parts of the KV heads with their queries' heads. ``q``, ``kv``: transfers.
    """

    def __init__(
        self,
        name: str,
        home: Home,
        mask: MaskSlices,
        tasks: Tasks,
        widths: Widths,
        groups: int = 1,
        gathered: bool = False,
    ) -> None:
        """``gathered``: every server gets all keys, read or not (all-gather context parallelism)."""
        self.name, self.home, self.mask, self.tasks = name, home, mask, tasks
        self.widths, self.groups, self.servers = widths, groups, home.ranks
        assert widths.kv_heads % groups == 0, "heads groups are equal parts of the KV heads"
        self.q = Transfers.of(home, tasks.server, tasks.group, tasks.doc, tasks.q0, tasks.q1)
        if gathered:
            assert groups == 1, "a gather has all heads"
            docs = np.tile(np.arange(len(home.lengths)), home.ranks)
            dest = np.repeat(np.arange(home.ranks), len(home.lengths))
            self.kv = Transfers.of(home, dest, docs * 0, docs, docs * 0, home.lengths[docs])
        else:
            self.kv = Transfers.of(home, tasks.server, tasks.group, tasks.doc, tasks.k0, tasks.k1)

    @cached_property
    def cost(self) -> CostReport:
        work = np.bincount(self.tasks.server, weights=self.tasks.area, minlength=self.servers).astype(np.int64)
        sides = [moves.away(self.servers) for moves in (self.q, self.kv)]
        return CostReport(work, *sides[0], *sides[1], self.groups, self.widths)

    def rank(self, rank: int) -> RankPlan:
        """One rank's indices, expanded to tokens."""
        mine = np.flatnonzero(self.tasks.server == rank)
        t = self.tasks
        order = mine[np.lexsort((t.k0[mine], t.q0[mine], t.doc[mine], t.group[mine]))]
        q, q_at = self._exchange(self.q, rank, order, t.q0)
        kv, k_at = self._exchange(self.kv, rank, order, t.k0)
        q0, k0 = t.q0[order], t.k0[order]
        shift = q0 - k0
        return RankPlan(
            int(self.home.tokens[rank]), q, kv, t.group[order],
            q_at, q_at + t.q1[order] - q0, k_at, k_at + t.k1[order] - k0, t.lo[order] + shift, t.hi[order] + shift,
        )  # fmt: skip

    def _exchange(self, moves: Transfers, rank: int, tasks: Int64, first: Int64) -> tuple[Exchange, Int64]:
        """The rank's side, and where each task's ``first`` position lies in the ordered buffer."""
        low, high = np.searchsorted(moves.source, [rank, rank + 1])
        sent = moves.part(np.arange(low, high))
        got = moves.part(np.flatnonzero(moves.dest == rank))
        stride, docs = self.home.stride, len(self.home.lengths)
        key = (got.group * docs + got.doc) * stride + got.start
        by_position = np.argsort(key)
        arrived = np.cumsum(got.rows) - got.rows
        order = ranges(arrived[by_position], got.rows[by_position])
        placed = np.cumsum(got.rows[by_position]) - got.rows[by_position]
        wanted = (self.tasks.group[tasks] * docs + self.tasks.doc[tasks]) * stride + first[tasks]
        at = np.searchsorted(key[by_position], wanted, "right") - 1
        to, of = (
            np.bincount(ends, weights=part.rows, minlength=self.servers).astype(np.int64)
            for ends, part in ((sent.dest, sent), (got.source, got))
        )
        send, send_group = ranges(sent.offset, sent.rows), np.repeat(sent.group, sent.rows)
        exchange = Exchange(send, send_group, to, of, order)
        return exchange, placed[at] + wanted - key[by_position][at]
