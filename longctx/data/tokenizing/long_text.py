"""Encodes one long text piece by piece, with the ids of the whole: a library needs 200 bytes for each byte of a piece.

Two pieces overlap. Where both have the same tokens at the same places for a while, what is left of the middle of that
stretch follows from the one and what is right of it from the other: a row of tokens is what byte-pair encoding makes of
a text if each two neighbours are, and the neighbours at the cut stand so in both pieces. Where no such stretch is
found, the text is encoded whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 19  # characters
OVERLAP = 1 << 12  # characters that a piece reaches into its neighbour, either way
AGREE = 12  # tokens on either side of a cut that must be the same

Ids = NDArray[np.uint32]


class _Piece(NamedTuple):
    """Holds tokens with their places in the text: int64 ``[T, 3]`` of id, start and end."""

    tokens: NDArray[np.int64]

    @property
    def ids(self) -> Ids:
        return self.tokens[:, 0].astype(np.uint32)


def encode_long(library: Any, text: str, piece: int = PIECE, overlap: int = OVERLAP) -> Ids | None:
    """Returns the ids of a text, or None where its pieces do not fit together."""
    parts: list[Ids] = []
    first, left = 0, _encode(library, text, 0, piece + overlap)
    for middle in range(piece, len(text), piece):
        right = _encode(library, text, middle - overlap, middle + piece + overlap)
        cut = _cut(left, right, middle, overlap)
        if cut is None or cut[0] < first:
            return None
        parts.append(left.ids[first : cut[0]])
        first, left = cut[1], right
    return np.concatenate([*parts, left.ids[first:]])


def _encode(library: Any, text: str, start: int, stop: int) -> _Piece:
    (encoding,) = library.encode_batch([text[start:stop]], add_special_tokens=False)
    tokens = np.empty((len(encoding.ids), 3), dtype=np.int64)
    tokens[:, 0] = encoding.ids
    tokens[:, 1:] = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
    return _Piece(tokens)


def _cut(left: _Piece, right: _Piece, middle: int, overlap: int) -> tuple[int, int] | None:
    """Returns the numbers of one token in both pieces around which they agree, the nearest to the middle."""
    starts = left.tokens[:, 1]
    inside = np.flatnonzero(np.abs(starts - middle) <= overlap // 2)
    for one in inside[np.argsort(np.abs(starts[inside] - middle), kind="stable")].tolist():
        other = int(np.searchsorted(right.tokens[:, 1], starts[one]))
        if min(one, other) < AGREE:
            continue
        ours, theirs = (piece.tokens[at - AGREE : at + AGREE] for piece, at in ((left, one), (right, other)))
        # Tokens of the parts of one character share its place: two cuts within it could be taken for one another.
        apart = starts[one] > starts[one - 1]
        if apart and len(ours) == 2 * AGREE and np.array_equal(ours, theirs):
            return one, other
    return None
