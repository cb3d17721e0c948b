"""Where tokens are at home: on the ranks of one sequence group, or of several that each hold a batch of their own.

Whoever computes attention for others needs to know no more of a batch than this and its documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longctx.sequence.documents import Documents, Int64
from longctx.sequence.mask import Mask
from longctx.sequence.plan import SequencePlan


@dataclass(frozen=True, eq=False)
class TokenOwnership:
    """Tokens of all batch rows, numbered row by row: row times ``length`` plus position.

    ``documents``: of each row. ``shard``: physical tokens of a row on one rank. ``numbers[rank]``: of the rank's valid
    tokens, ascending, int64. ``lines[rank]``: where those lie in its line of ``physical[rank]`` tokens, ``[B * T/SP]``.
    """

    documents: tuple[Documents, ...]
    mask: Mask
    length: int
    shard: int
    numbers: tuple[Int64, ...]
    lines: tuple[Int64, ...]
    physical: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.numbers)

    @cached_property
    def runs(self) -> TokenRuns:
        return TokenRuns(self.numbers, self.lines)

    @cached_property
    def bounds(self) -> tuple[Int64, Int64]:
        """First numbers, and last + 1, of the documents of all rows, ascending."""
        edges = [row.cu_seqlens + number * self.length for number, row in enumerate(self.documents)]
        return np.concatenate([row[:-1] for row in edges]), np.concatenate([row[1:] for row in edges])

    def places(self, rank: int) -> Int64:
        """Where on its line the rank's tokens lie that belong to a document, int64."""
        row, position = np.divmod(self.numbers[rank], self.length)
        ends = np.array([one.length for one in self.documents])
        return np.asarray(self.lines[rank][position < ends[row]])

    @classmethod
    def of(cls, plan: SequencePlan) -> TokenOwnership:
        """The ranks that share the sequences of one batch."""
        return cls.side_by_side([plan])

    @classmethod
    def side_by_side(cls, plans: Sequence[SequencePlan | None]) -> TokenOwnership:
        """Groups of ranks one behind the other, each of which holds a batch of its own, or (None) nothing.

        The plans are of one run: of one mask and layout, and of sequences of one length.
        """
        one = next(plan for plan in plans if plan is not None)
        documents: list[Documents] = []
        numbers: list[Int64] = []
        lines: list[Int64] = []
        physical: list[int] = []
        for plan in plans:
            rows = np.arange(0 if plan is None else len(plan.documents))[:, None]
            first = len(documents)
            for rank in range(one.world):
                positions = one.positions(rank)
                numbers.append(((first + rows) * one.length + positions).ravel())
                lines.append((rows * one.shard + np.arange(len(positions))).ravel())
                physical.append(len(rows) * one.shard)
            if plan is not None:
                assert (plan.mask, plan.length, plan.shard) == (one.mask, one.length, one.shard), "plans of one run"
                documents += plan.documents
        return cls(tuple(documents), one.mask, one.length, one.shard, tuple(numbers), tuple(lines), tuple(physical))


class TokenRuns:
    """Tokens that lie side by side on one rank: ``start``, ``stop`` (numbers), ``rank``, int64 ``[N]``, ordered
    by number."""

    def __init__(self, numbers: Sequence[Int64], lines: Sequence[Int64]) -> None:
        columns = [_runs(rank, *held) for rank, held in enumerate(zip(numbers, lines, strict=True))]
        start = np.concatenate([column[0] for column in columns])
        order = np.argsort(start, kind="stable")
        self.start = start[order]
        self.stop, self.rank = (np.concatenate([column[place] for column in columns])[order] for place in (1, 2))


def ranges(first: Int64, count: Int64) -> Int64:
    """``first[i], first[i] + 1, ..`` of ``count[i]`` numbers each, one after another."""
    before = np.cumsum(count) - count
    return np.asarray(np.repeat(first - before, count) + np.arange(int(count.sum()), dtype=np.int64))


def touched(start: Int64, stop: Int64, first: Int64, last: Int64) -> tuple[Int64, Int64]:
    """(which of the intervals ``[first, last)``, which of ``[start, stop)``, disjoint and ascending) that meet."""
    begin = np.searchsorted(stop, first, "right")
    count = np.maximum(np.searchsorted(start, last) - begin, 0)
    return np.repeat(np.arange(len(first)), count), ranges(begin, count)


def _runs(rank: int, number: Int64, line: Int64) -> tuple[Int64, Int64, Int64]:
    breaks = np.flatnonzero((np.diff(number) != 1) | (np.diff(line) != 1)) + 1
    opens, closes = np.append(0, breaks)[: len(number)], np.append(breaks, len(number))[: len(number)] - 1
    return number[opens], number[closes] + 1, np.full_like(opens, rank)
