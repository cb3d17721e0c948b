"""Evens out the attention work of what ranks compute at the same time.

It deals a step's rows by their cost, or packs documents anew. All rows have equal tokens, so all but attention costs
the same everywhere. What a row costs there follows from the lengths of its documents, which may differ a hundredfold
between rows.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longctx.rules import whole

Int64 = NDArray[np.int64]
Piece = tuple[int, int, int]  # (start, stop, end of its document), in positions of the corpus

WINDOW = 64  # rows whose documents are packed anew together


@dataclass(frozen=True)
class Balance:
    """How attention work is evened out, and how it is counted.

    ``documents``: whether rows are packed for even work, or only dealt by what they cost. ``window``: tokens that a
    query sees, its own among them, None for all before it.
    """

    documents: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            whole("attention.window", self.window, 1)

    def cells(self, lengths: Int64) -> Int64:
        """Returns the (query, key) pairs of documents, int64 like ``lengths``."""
        seen = lengths if self.window is None else np.minimum(lengths, self.window)
        cells: Int64 = seen * (seen + 1) // 2 + (lengths - seen) * seen
        return cells

    @property
    def packing(self) -> str:
        """The name that a checkpoint gives to the resulting order of tokens."""
        if not self.documents:
            return STREAM
        return "documents" if self.window is None else f"documents, attention.window={self.window}"


STREAM = "as they stream"


def deal_rows(works: Int64, ranks: int, micro_batch: int) -> Int64:
    """Deals a step's rows to micro-batches of much the same cost: row numbers ``[ranks, micro-batches, micro_batch]``.

    Costs differ least between the micro-batches that ranks compute at the same time, and little between the ranks in
    all. Rows go out from the costliest down, one to each micro-batch in a round, and back in the next. Within a round
    the ranks' first micro-batches are served, then their second ones from the last rank back, and so on. Equal rows
    keep their order.
    """
    rounds = np.argsort(-works, kind="stable").reshape(micro_batch, -1)
    rounds[1::2] = rounds[1::2, ::-1]
    turns = rounds.reshape(micro_batch, -1, ranks)
    turns[:, 1::2] = turns[:, 1::2, ::-1]
    of_ranks: Int64 = turns.transpose(2, 1, 0)
    return of_ranks


def pack_pieces(pieces: list[Piece], rows: int, seq_len: int, balance: Balance) -> list[list[Piece]]:
    """Packs all tokens of ``pieces`` into ``rows`` rows of ``seq_len``, which they fill exactly.

    The longest goes first, into the row of least work among those that have enough free tokens. Where none has, it is
    cut to fill the emptiest row, and what is left of it is a piece like others. Ties go to the first.
    """
    assert sum(stop - start for start, stop, _ in pieces) == rows * seq_len, "pieces fill their rows"
    found: list[list[Piece]] = [[] for _ in range(rows)]
    free_tokens, work = np.full(rows, seq_len, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    waiting = [(start - stop, number, start, stop, end) for number, (start, stop, end) in enumerate(pieces)]
    heapq.heapify(waiting)
    while waiting:
        _, number, start, stop, end = heapq.heappop(waiting)
        fits = np.flatnonzero(free_tokens >= stop - start)
        row = int(fits[np.argmin(work[fits])] if len(fits) else np.argmax(free_tokens))
        taken = min(stop - start, int(free_tokens[row]))
        found[row].append((start, start + taken, end))
        free_tokens[row] -= taken
        work[row] += int(balance.cells(np.array(taken)))
        if start + taken < stop:
            heapq.heappush(waiting, (start + taken - stop, number, start + taken, stop, end))
    return found
