"""Packed documents: tokens of one sequence that may see each other at all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from longctx.errors import DataError
from longctx.rules import whole

Int64 = NDArray[np.int64]


class Documents:
    """Holds the boundaries of documents that are packed one after another into a sequence.

    ``cu_seqlens``: int64 ``[N + 1]``, strictly increasing from 0; document i holds the global positions
    ``cu_seqlens[i] <= p < cu_seqlens[i + 1]``. Positions from ``cu_seqlens[-1]`` on are padding: no token
    there sees or is seen.
    """

    __slots__ = ("_key", "cu_seqlens")

    def __init__(self, cu_seqlens: Int64) -> None:
        given = np.asarray(cu_seqlens)
        if given.dtype.kind not in "iu":
            raise DataError(f"cu_seqlens of dtype {given.dtype} must be whole numbers, such as int64")
        bounds = np.array(given, dtype=np.int64)  # a copy, which nobody else writes into
        if bounds.ndim != 1 or len(bounds) < 1 or bounds[0] != 0 or np.any(np.diff(bounds) <= 0):
            raise DataError(
                f"cu_seqlens {bounds.tolist()[:8]} must start at 0 and increase strictly; leave out empty documents"
            )
        bounds.flags.writeable = False
        self.cu_seqlens = bounds
        self._key = bounds.tobytes()

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> Documents:
        """Packs documents of these lengths in tokens, each at least 1."""
        known = isinstance(lengths, np.ndarray) and lengths.dtype.kind in "iu"
        counted = lengths if known else [whole("length of a document", one, 1) for one in _listed(lengths)]
        return cls(np.concatenate([[0], np.cumsum(np.asarray(counted, dtype=np.int64))]))

    @classmethod
    def single(cls, length: int) -> Documents:
        """Makes one document of ``length`` tokens; none when it is 0."""
        return cls.from_lengths([length] if whole("length of a document", length, 0) else [])

    @property
    def length(self) -> int:
        """Returns the number of tokens in all documents; padding is not counted."""
        return int(self.cu_seqlens[-1])

    @property
    def lengths(self) -> Int64:
        return np.diff(self.cu_seqlens)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def bounds_of(self, positions: Int64) -> tuple[Int64, Int64]:
        """Returns (start, stop) of the document that holds each position; start == stop == position for padding."""
        index = np.searchsorted(self.cu_seqlens, positions, side="right") - 1
        padding = positions >= self.length
        padded = np.append(self.cu_seqlens, self.length)
        start, stop = padded[index], padded[index + 1]
        return np.where(padding, positions, start), np.where(padding, positions, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Documents) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Documents({len(self)} documents, {self.length} tokens)"

    def __reduce__(self) -> tuple[type[Documents], tuple[Int64]]:
        return Documents, (self.cu_seqlens,)


def _listed(lengths: Iterable[int]) -> list[int]:
    """The lengths of documents; a single number or a word is none."""
    if isinstance(lengths, str | bytes) or not isinstance(lengths, Iterable):
        raise DataError(
            f"lengths of documents are {lengths!r}; they must be a list of whole numbers, such as [700, 324]"
        )
    return list(lengths)
