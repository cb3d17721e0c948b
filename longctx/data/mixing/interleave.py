"""Says which source a row of a mixture comes from: shares that hold at every prefix, found in one step for any row.

Rows come in blocks. By the end of block b, source k has had the rows that its share of all rows comes to, rounded so
that they add up. So no block needs to know those before it, and the shares never drift. Within a block the n-th row of
a source of share p stands where it is due, at (n - 1/2) / p. So a prefix is off by about a row, however long it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

from longctx.data.corpus import Int64

BLOCK = 1024  # rows whose order is made together, at least: each source has one of them
SMALLEST = Fraction(1, 1 << 20)  # share of rows


@dataclass(frozen=True)
class Turn:
    """Says where a row of the mixture comes from: the number of its source, and the number of the row there."""

    source: int
    row: int


class Interleave:
    """Deals rows to sources. ``shares``: of rows, exact, none below ``SMALLEST``; they add up to one."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        assert sum(shares) == 1 and min(shares) >= SMALLEST, "shares are parts of a whole"
        self.shares = tuple(shares)
        self._below = [Fraction(0), *accumulate(self.shares)]
        self._rows = max(BLOCK, math.ceil(1 / min(self.shares)))
        self._block: tuple[int, list[int], Int64, Int64] | None = None

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first ``rows`` rows each source has."""
        block, place = divmod(rows, self._rows)
        firsts, sources, _ = self._of(block)
        return [first + int(np.count_nonzero(sources[:place] == k)) for k, first in enumerate(firsts)]

    def place(self, row: int) -> Turn:
        """Returns where a row comes from."""
        block, place = divmod(row, self._rows)
        firsts, sources, numbers = self._of(block)
        source = int(sources[place])
        return Turn(source, firsts[source] + int(numbers[place]))

    def _of(self, block: int) -> tuple[list[int], Int64, Int64]:
        """Returns the rows that each source has had before a block, and of each of its rows source and number in it."""
        made = self._block
        if made is None or made[0] != block:
            firsts, ends = self._before(block), self._before(block + 1)
            sources = np.repeat(np.arange(len(firsts)), np.subtract(ends, firsts))
            numbers = np.concatenate([np.arange(end - first) for first, end in zip(firsts, ends, strict=True)])
            due = np.concatenate(
                [
                    # Of the exact place only what lies inside the block is left to rounding.
                    float((first + Fraction(1, 2)) / share - block * self._rows) + np.arange(end - first) / float(share)
                    for first, end, share in zip(firsts, ends, self.shares, strict=True)
                    if end > first
                ]
            )
            order = np.argsort(due, kind="stable")
            self._block = made = (block, firsts, sources[order], numbers[order])
        return made[1:]

    def _before(self, block: int) -> list[int]:
        rows = block * self._rows
        bounds = [int(below * rows) for below in self._below]
        return [stop - start for start, stop in pairwise(bounds)]
