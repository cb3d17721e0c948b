"""Where tokens are at home: on the ranks of one sequence group, or of several that each hold a batch of their own.

Whoever computes attention for others needs to know no more of a batch than this and its documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longctx.sequence.documents import Documents, Int64
from longctx.sequence.mask import Mask
from longctx.sequence.plan import SequencePlan


@dataclass(frozen=True, eq=False)
class Homes:
    """Tokens of all batch rows, numbered row by row: row times ``length`` plus position.

    ``documents``: of each row. ``shard``: physical tokens of a row on one rank. ``numbers[rank]``: of the rank's valid
    tokens, ascending, int64. ``lines[rank]``: where those lie in its line of physical tokens, ``[B * T/SP]``.
    """

    documents: tuple[Documents, ...]
    mask: Mask
    length: int
    shard: int
    numbers: tuple[Int64, ...]
    lines: tuple[Int64, ...]

    @property
    def world(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(cls, plan: SequencePlan) -> Homes:
        """The ranks that share the sequences of one batch."""
        return cls.side_by_side([plan])

    @classmethod
    def side_by_side(cls, plans: Sequence[SequencePlan | None]) -> Homes:
        """Groups of ranks one behind the other, each of which holds a batch of its own, or (None) nothing.

        The plans are of one run: of one mask and layout, and of sequences of one length.
        """
        one = next(plan for plan in plans if plan is not None)
        documents: list[Documents] = []
        numbers: list[Int64] = []
        lines: list[Int64] = []
        for plan in plans:
            rows = np.arange(0 if plan is None else len(plan.documents))[:, None]
            first = len(documents)
            for rank in range(one.world):
                positions = one.positions(rank)
                numbers.append(((first + rows) * one.length + positions).ravel())
                lines.append((rows * one.shard + np.arange(len(positions))).ravel())
            if plan is not None:
                assert (plan.mask, plan.length, plan.shard) == (one.mask, one.length, one.shard), "plans of one run"
                documents += plan.documents
        return cls(tuple(documents), one.mask, one.length, one.shard, tuple(numbers), tuple(lines))
