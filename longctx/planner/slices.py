"""Describes masks as slices: rectangles of one document cut by one diagonal band.

They are closed under cuts along queries and keys, after MagiAttention's dynamic solver. A type (full, causal,
bi-causal) does not survive a cut along keys, a band does. Everything here is integers in document coordinates. Row
functions take arrays; ``Slice`` is the same for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from longctx.errors import ConfigError

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of document ``doc``: those with ``start <= position < stop``."""

    doc: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Slice:
    """A set of (query, key) cells: those with ``q0 <= q < q1``, ``k0 <= k < k1`` and ``lo <= k - q <= hi``."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int

    @property
    def area(self) -> int:
        """Number of visible cells of the slice."""
        return sum(
            _below(self.q0, self.q1, self.k0, self.k1, d) * sign for d, sign in ((self.hi, 1), (self.lo - 1, -1))
        )

    def cut_q(self, at: int) -> tuple[Slice, Slice]:
        """Cuts the slice into rows before ``at`` and rows from ``at`` on."""
        at = min(max(at, self.q0), self.q1)
        return replace(self, q1=at), replace(self, q0=at)

    def cut_k(self, at: int) -> tuple[Slice, Slice]:
        """Cuts the slice into keys before ``at`` and keys from ``at`` on."""
        at = min(max(at, self.k0), self.k1)
        return replace(self, k1=at), replace(self, k0=at)

    def trimmed(self) -> Slice:
        """Returns the same cells in the smallest rectangle; one without cells has ``q0 == q1`` or ``k0 == k1``."""
        k0, k1 = max(self.k0, self.q0 + self.lo), min(self.k1, self.q1 + self.hi)
        q0, q1 = max(self.q0, k0 - self.hi), min(self.q1, k1 - self.lo)
        return replace(self, q0=q0, q1=max(q0, q1), k0=k0, k1=max(k0, k1))


def _below(q0: int, q1: int, k0: int, k1: int, d: int) -> int:
    """Returns the number of cells of the rectangle with ``k - q <= d``."""
    first = q0 + d - k0 + 1  # keys of the first row before they are clamped to the rectangle
    return _ramp(first + max(0, q1 - q0), max(0, k1 - k0)) - _ramp(first, max(0, k1 - k0))


def _ramp(t: int, keys: int) -> int:
    """Returns the sum of ``clamp(s, 0, keys)`` over ``s < t``."""
    rising = min(max(t, 0), keys)
    return rising * (rising - 1) // 2 + max(0, t - keys) * keys


def areas(q0: Int64, q1: Int64, k0: Int64, k1: Int64, lo: Int64, hi: Int64) -> Int64:
    """Returns the area of many slices at once, int64 ``[N]``."""
    rows, keys = np.maximum(q1 - q0, 0), np.maximum(k1 - k0, 0)

    def below(d: Int64) -> Int64:
        first = q0 + d - k0 + 1
        return ramp(first + rows) - ramp(first)

    def ramp(t: Int64) -> Int64:
        rising = np.clip(t, 0, keys)
        return np.asarray(rising * (rising - 1) // 2 + np.maximum(t - keys, 0) * keys)

    return np.asarray(below(hi) - below(lo - 1), dtype=np.int64)


class MaskSlices:
    """What every document's queries may see: ``per_doc`` disjoint slices for each document, as columns.

    ``q0 .. hi``: int64 ``[documents * per_doc]``, document-major; a document with fewer pads with empty slices.
    ``causal``: a single causal triangle per document, for which cuts have a closed form.
    """

    __slots__ = ("causal", "hi", "k0", "k1", "lengths", "lo", "per_doc", "q0", "q1")

    def __init__(self, lengths: Int64, columns: Sequence[Int64], per_doc: int, causal: bool = False) -> None:
        self.lengths, self.per_doc, self.causal = lengths, per_doc, causal
        self.q0, self.q1, self.k0, self.k1, self.lo, self.hi = columns
        assert all(len(column) == per_doc * len(lengths) for column in columns), "columns are [documents * per_doc]"

    @property
    def columns(self) -> tuple[Int64, ...]:
        """Lengths of the documents, then the columns of their slices."""
        return self.lengths, self.q0, self.q1, self.k0, self.k1, self.lo, self.hi

    def clipped(self, number: int, doc: Int64, start: Int64, stop: Int64) -> tuple[Int64, ...]:
        """Returns the columns of slice ``number`` of each ``doc``, cut to rows ``[start, stop)``."""
        at = doc * self.per_doc + number
        q0 = np.maximum(self.q0[at], start)
        q1 = np.maximum(np.minimum(self.q1[at], stop), q0)
        return q0, q1, self.k0[at], self.k1[at], self.lo[at], self.hi[at]

    def area(self, doc: Int64, start: Int64, stop: Int64) -> Int64:
        """Returns the cells of rows ``[start, stop)`` of each document, int64 ``[N]``."""
        if self.causal:
            return np.asarray((stop - start) * (start + stop + 1) // 2, dtype=np.int64)
        return np.asarray(sum(areas(*self.clipped(n, doc, start, stop)) for n in range(self.per_doc)), dtype=np.int64)

    def of(self, doc: int) -> list[Slice]:
        """Returns the slices of one document, without the empty ones."""
        columns = (self.q0, self.q1, self.k0, self.k1, self.lo, self.hi)
        rows = (tuple(int(c[doc * self.per_doc + n]) for c in columns) for n in range(self.per_doc))
        return [one for one in (Slice(*row) for row in rows) if one.area]

    def rows_area(self, doc: int, start: int, stop: int) -> int:
        """Returns the cells of one run of rows."""
        if self.causal:
            return (stop - start) * (start + stop + 1) // 2
        return sum(replace(s, q0=max(s.q0, start), q1=max(min(s.q1, stop), s.q0, start)).area for s in self.of(doc))


def causal(lengths: Iterable[int]) -> MaskSlices:
    """Returns a mask under which a query sees its document up to itself."""
    n = _lengths(lengths)
    return MaskSlices(n, (n * 0, n, n * 0, n, -n, n * 0), 1, causal=True)


def full(lengths: Iterable[int]) -> MaskSlices:
    """Returns a mask under which a query sees its whole document."""
    n = _lengths(lengths)
    return MaskSlices(n, (n * 0, n, n * 0, n, -n, n), 1)


def window(lengths: Iterable[int], size: int, two_sided: bool = False) -> MaskSlices:
    """Returns a mask under which a query sees the last ``size`` tokens, itself among them.

    If ``two_sided``, it sees as many after it.
    """
    if size < 1:
        raise ConfigError(f"window {size} must be at least 1 (a query sees itself)")
    n = _lengths(lengths)
    return MaskSlices(n, (n * 0, n, n * 0, n, n * 0 - (size - 1), n * 0 + (size - 1 if two_sided else 0)), 1)


def prefix_lm(lengths: Iterable[int], prefixes: Iterable[int]) -> MaskSlices:
    """Returns a mask under which the first ``prefix`` tokens see each other; the rest is causal."""
    n = _lengths(lengths)
    p = np.asarray(list(prefixes), dtype=np.int64)
    if p.shape != n.shape or np.any(p < 0) or np.any(p > n):
        raise ConfigError(f"prefixes {p.tolist()[:8]} must be one per document, from 0 to its length")
    return _interleaved(n, [(n * 0, p, n * 0, p, -n, n), (p, n, n * 0, n, -n, n * 0)])


def shared_prefix(prompts: Iterable[int], chosen: Iterable[int], rejected: Iterable[int]) -> MaskSlices:
    """Returns the mask of packed preference pairs, prompt + chosen + rejected.

    It is causal, but rejected rows do not see the chosen ones. Where the rejected answer's first label needs the
    prompt's last logits, the caller duplicates that token.
    """
    p, c, r = (_lengths(part) for part in (prompts, chosen, rejected))
    if not len(p) == len(c) == len(r):
        raise ConfigError(f"{len(p)} prompts, {len(c)} chosen and {len(r)} rejected answers must be equally many")
    a, n = p + c, p + c + r
    zero = n * 0
    return _interleaved(n, [(zero, a, zero, a, -n, zero), (a, n, zero, p, -n, n), (a, n, a, n, -n, zero)])


def _lengths(lengths: Iterable[int]) -> Int64:
    found = np.fromiter(lengths, dtype=np.int64) if not isinstance(lengths, np.ndarray) else lengths.astype(np.int64)
    if np.any(found < 1):
        raise ConfigError(f"document lengths must be at least 1, got {int(found.min())}; leave out empty documents")
    return found


def _interleaved(lengths: Int64, slices: Sequence[Sequence[Int64]]) -> MaskSlices:
    columns = [np.stack(column, axis=1).reshape(-1) for column in zip(*slices, strict=True)]
    return MaskSlices(lengths, columns, len(slices))
