"""Lists what is sent from rank to rank: the union of what a server reads; a token crosses once per (token, server)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.slices import Int64
from longctx.planner.tasks import ranges


@dataclass(frozen=True, eq=False)
class Transfers:
    """Tokens that ``dest`` reads of ``source``, as int64 columns ``[N]``.

    They are tokens ``[start, stop)`` of ``doc``, for heads ``group``. ``offset``: the local row of the first one on the
    source. Ordered by source, destination, group, document and position. With source == destination
    it stays where it is. No token comes twice to a destination.
    """

    source: Int64
    dest: Int64
    group: Int64
    doc: Int64
    start: Int64
    stop: Int64
    offset: Int64

    @classmethod
    def of(cls, home: DocumentPlacement, dest: Int64, group: Int64, doc: Int64, start: Int64, stop: Int64) -> Transfers:
        """Returns the union of the intervals that each destination reads, cut at the spans of their homes."""
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
        sort_dtype = np.int16 if home.ranks <= 32767 else np.int64
        order = np.argsort(columns[0].astype(sort_dtype), kind="stable")
        return cls(*(column[order] for column in columns))

    @property
    def rows(self) -> Int64:
        return self.stop - self.start

    def matrix(self, ranks: int) -> Int64:
        """Returns (token, group) rows from rank to rank, int64 ``[W, W]``; those that stay are on the diagonal."""
        flat = np.bincount(self.source * ranks + self.dest, weights=self.rows, minlength=ranks * ranks)
        return np.asarray(flat.astype(np.int64).reshape(ranks, ranks))

    def away(self, ranks: int) -> tuple[Int64, Int64]:
        """Returns the rows that each rank sends to others and receives from others, int64 ``[W]``."""
        moved = np.where(self.source == self.dest, 0, self.rows)
        sent, got = (np.bincount(ends, weights=moved, minlength=ranks) for ends in (self.source, self.dest))
        return sent.astype(np.int64), got.astype(np.int64)

    @property
    def columns(self) -> tuple[Int64, ...]:
        return self.source, self.dest, self.group, self.doc, self.start, self.stop, self.offset

    def part(self, where: Int64) -> Transfers:
        return Transfers(*(column[where] for column in self.columns))

    def joined(self, other: Transfers) -> Transfers:
        """Returns these transfers and behind them those of ``other``."""
        return Transfers(*map(np.concatenate, zip(self.columns, other.columns, strict=True)))


def _united(
    dest: Int64, group: Int64, doc: Int64, start: Int64, stop: Int64, docs: int, stride: int
) -> tuple[Int64, Int64, Int64, Int64, Int64]:
    """Joins overlapping and touching intervals of one (destination, group, document), sorted by all."""
    groups = int(group.max(initial=0)) + 1
    base = ((dest * groups + group) * docs + doc) * stride
    order = np.argsort(base + start)
    base, low = base[order], (base + start)[order]
    reach = np.maximum.accumulate(base + stop[order])
    opens = np.append(True, low[1:] > reach[:-1]) if len(low) else np.zeros(0, dtype=bool)
    closes = np.append(opens[1:], True) if len(low) else opens
    pick = order[opens]
    return dest[pick], group[pick], doc[pick], start[pick], reach[closes] - base[opens]
