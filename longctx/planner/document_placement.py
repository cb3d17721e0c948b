"""Document placements: where each token lives outside attention, as spans of documents by rank.

A rank's spans are in the order of its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from longctx.errors import ConfigError
from longctx.planner.slices import Int64, Span


class DocumentPlacement:
    """Holds the spans of documents of every rank; all ranks together partition all documents.

    Columns are int64 ``[N]``: ``rank`` (ascending), ``doc``, ``start``, ``stop``, ``offset``. ``offset``: the local row
    of a span's first token; where no column says it, spans lie one after another. ``rows``: local rows of each rank,
    padding included; as many as tokens by default.
    """

    def __init__(self, lengths: Int64, ranks: int, columns: Sequence[Int64] | Int64, rows: Int64 | None = None) -> None:
        self.lengths, self.ranks = lengths, ranks
        self.rank: Int64 = columns[0]
        self.doc: Int64 = columns[1]
        self.start: Int64 = columns[2]
        self.stop: Int64 = columns[3]
        sizes = self.stop - self.start
        before = np.cumsum(sizes) - sizes
        self.tokens: Int64 = np.bincount(self.rank, weights=sizes, minlength=ranks).astype(np.int64)
        dense = before - (np.cumsum(self.tokens) - self.tokens)[self.rank]
        self.offset: Int64 = columns[4] if len(columns) > 4 else dense
        self.rows: Int64 = self.tokens if rows is None else rows
        self._check(sizes)

    def _check(self, sizes: Int64) -> None:
        order = self.by_position
        doc, start, stop = self.doc[order], self.start[order], self.stop[order]
        opens = np.append(True, np.diff(doc) > 0) if len(doc) else np.zeros(0, dtype=bool)
        expected = np.where(opens, 0, np.append(0, stop[:-1])) if len(doc) else start
        covered = np.bincount(doc, weights=sizes[order], minlength=len(self.lengths)).astype(np.int64)
        if np.any(sizes < 1) or np.any(start != expected) or not np.array_equal(covered, self.lengths):
            raise ConfigError(
                "the spans of all ranks must partition every document; "
                f"{len(self.lengths)} documents of {int(self.lengths.sum())} tokens got {int(sizes.sum())} in spans"
            )
        assert np.all(np.diff(self.rank) >= 0), "spans come by rank"

    @classmethod
    def of(cls, lengths: Sequence[int] | Int64, spans: Sequence[Sequence[Span]]) -> DocumentPlacement:
        """Makes a placement from the spans of each rank."""
        rows = [(rank, one.doc, one.start, one.stop) for rank, held in enumerate(spans) for one in held]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return cls(np.asarray(lengths, dtype=np.int64), len(spans), table.T.copy())

    def spans(self, rank: int) -> list[Span]:
        """Returns the spans of a rank in order."""
        low, high = np.searchsorted(self.rank, [rank, rank + 1])
        columns = (self.doc[low:high], self.start[low:high], self.stop[low:high])
        return [Span(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    @property
    def columns(self) -> tuple[Int64, ...]:
        """Returns all columns: of documents, of spans, then of ranks."""
        return self.lengths, self.rank, self.doc, self.start, self.stop, self.offset, self.rows

    def span(self, doc: Int64, position: Int64) -> Int64:
        """Returns which span, in order of document and position, holds each of these tokens."""
        return np.asarray(np.searchsorted(self.table[0], doc * self.stride + position, "right") - 1)

    def place(self, doc: Int64, position: Int64) -> Int64:
        """Returns the local row of each of these tokens."""
        at = self.span(doc, position)
        return np.asarray(self.table[5][at] + position - self.table[2][at])

    @cached_property
    def by_position(self) -> Int64:
        """Returns the numbers of the spans in order of document and position."""
        return np.lexsort((self.start, self.doc))

    @cached_property
    def table(self) -> tuple[Int64, ...]:
        """Returns (key, doc, start, stop, rank, offset) of the spans, in order of document and position.

        ``key`` = ``doc * stride + start`` ascends.
        """
        order = self.by_position
        return (self.doc[order] * self.stride + self.start[order], *(
            column[order] for column in (self.doc, self.start, self.stop, self.rank, self.offset)
        ))  # fmt: skip

    @cached_property
    def stride(self) -> int:
        """Returns a number above any position, so that ``doc * stride + position`` orders tokens of all documents."""
        return int(self.lengths.max(initial=0)) + 1


def streamed(lengths: Int64 | Sequence[int], ranks: int) -> DocumentPlacement:
    """Places documents as DistCA's linear layout: they stream into ranks of equal token budgets.

    Budgets differ by at most one token. Of a document that crosses a boundary each rank gets a head piece and the
    mirrored tail piece. So tokens are equal and its causal work nearly so.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    edges = np.arange(1, ranks + 1) * int(lengths.sum()) // ranks
    ends = np.cumsum(lengths)
    first, last = np.searchsorted(edges, ends - lengths, "right"), np.searchsorted(edges, ends)
    whole = np.flatnonzero(first == last)
    inside = np.stack([first[whole], whole, whole * 0, lengths[whole]], axis=1)
    rows: list[tuple[int, int, int, int]] = []
    for doc in np.flatnonzero(first != last).tolist():
        head, tail, used = 0, int(lengths[doc]), int(ends[doc] - lengths[doc])
        for rank in range(int(first[doc]), int(last[doc]) + 1):
            take = min(tail - head, int(edges[rank]) - used)
            used += take
            front = take if take == tail - head else (take + 1) // 2
            rows += [(rank, doc, head, head + front), (rank, doc, tail - (take - front), tail)]
            head, tail = head + front, tail - (take - front)
    cut = np.array(rows, dtype=np.int64).reshape(-1, 4)
    table = np.concatenate([inside, cut[cut[:, 3] > cut[:, 2]]])
    return DocumentPlacement(lengths, ranks, table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))].T.copy())


def contiguous(lengths: Int64 | Sequence[int], ranks: int) -> DocumentPlacement:
    """Places documents one after another, cut into consecutive shards that differ by at most one token."""
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    rows = []
    total = int(lengths.sum())
    for rank in range(ranks):
        low, high = rank * total // ranks, (rank + 1) * total // ranks
        if low == high:
            continue  # fewer tokens than ranks, and the edge may lie inside a document
        for doc in range(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high))):
            begin = int(starts[doc])
            rows.append((rank, doc, max(low, begin) - begin, min(high, int(ends[doc])) - begin))
    return from_rows(lengths, ranks, rows)


def zigzag(lengths: Int64 | Sequence[int], ranks: int) -> DocumentPlacement:
    """Places every document over all ranks: rank r holds chunks r and 2P-1-r of 2P.

    Llama 3's per-document context parallelism without padding. The last ``length % 2P`` tokens of a document go one by
    one to the ranks, from where the document before stopped.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rows, turn = [], 0
    for doc, length in enumerate(lengths.tolist()):
        placed, turn = zigzag_spans(length, list(range(ranks)), turn)
        rows += [(rank, doc, start, stop) for rank, start, stop in placed]
    return from_rows(lengths, ranks, rows)


def zigzag_spans(length: int, members: Sequence[int], turn: int = 0) -> tuple[list[tuple[int, int, int]], int]:
    """Returns (rank, start, stop) of one document over ``members``, and the member whose turn is next."""
    ring = len(members)
    size = length // (2 * ring)
    rows = []
    if size:
        for place, rank in enumerate(members):
            mirror = 2 * ring - 1 - place
            rows += [(rank, place * size, (place + 1) * size), (rank, mirror * size, (mirror + 1) * size)]
    for position in range(2 * ring * size, length):
        rows.append((members[turn % ring], position, position + 1))
        turn += 1
    return rows, turn


def whole(rows: Sequence[Int64], ranks: int) -> DocumentPlacement:
    """Places row i of documents, given by their lengths, whole on rank i; ranks after the last row hold none."""
    lengths = np.concatenate(rows)
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    spans = [(rank, doc, 0, length) for doc, (rank, length) in enumerate(zip(owner.tolist(), lengths.tolist()))]
    return from_rows(lengths, ranks, spans)


def from_rows(lengths: Int64, ranks: int, rows: Sequence[tuple[int, int, int, int]]) -> DocumentPlacement:
    """Makes a placement from (rank, doc, start, stop) in any order of ranks; a rank keeps its own order."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return DocumentPlacement(lengths, ranks, table[np.argsort(table[:, 0], kind="stable")].T.copy())
