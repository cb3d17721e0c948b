"""Cuts tiles into the shapes that a fused kernel with a square, top-left causal mask can compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from longctx.sequence import Tile

# A window narrower than this is computed with an explicit mask on chunks of as many rows. Triangles of its own width
# would be too many launches.
NARROW_WINDOW = 128


class PieceShape(Enum):
    """Which cells of a piece a kernel computes."""

    FULL = "every query sees every key"
    CAUSAL = "square; query i sees keys j <= i"
    ANTICAUSAL = "square; query i sees keys j >= i"
    BAND = "query i sees keys i <= j < i + width; computed with a mask"


SQUARES = (PieceShape.CAUSAL, PieceShape.ANTICAUSAL)


@dataclass(frozen=True, slots=True)
class TilePiece:
    """Part of a tile that one kernel call computes: queries ``[q_start, q_stop)`` against keys ``[k_start, k_stop)``.

    Both are local rows.
    """

    shape: PieceShape
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


def pieces_of(tile: Tile) -> Iterator[TilePiece]:
    """Yields pieces that cover the tile's visible cells exactly once and, BAND apart, nothing else."""
    n, q, k = tile.queries, tile.q_start, tile.k_start
    if not tile.lower and not tile.upper:
        yield TilePiece(PieceShape.FULL, q, tile.q_stop, k, tile.k_stop)
    elif not tile.lower:
        corner = k + tile.first_keys - 1  # the first query's last key: there the square begins
        if corner > k:
            yield TilePiece(PieceShape.FULL, q, tile.q_stop, k, corner)
        yield TilePiece(PieceShape.CAUSAL, q, tile.q_stop, corner, tile.k_stop)
    elif not tile.upper:
        yield TilePiece(PieceShape.ANTICAUSAL, q, tile.q_stop, k, k + n)
        if tile.keys > n:
            yield TilePiece(PieceShape.FULL, q, tile.q_stop, k + n, tile.k_stop)
    else:
        yield from _band_pieces(tile)


def _band_pieces(tile: Tile) -> Iterator[TilePiece]:
    """Yields a sliding window, chunk by chunk: keys that leave (anticausal), stay (full) and enter (causal)."""
    width = tile.first_keys
    chunk = max(width, NARROW_WINDOW)
    for first in range(0, tile.queries, chunk):
        n = min(chunk, tile.queries - first)
        q, k = tile.q_start + first, tile.k_start + first
        if width < NARROW_WINDOW:
            yield TilePiece(PieceShape.BAND, q, q + n, k, k + n + width - 1)
            continue
        yield TilePiece(PieceShape.ANTICAUSAL, q, q + n, k, k + n)
        if n < width:
            yield TilePiece(PieceShape.FULL, q, q + n, k + n, k + width)
        if n > 1:
            yield TilePiece(PieceShape.CAUSAL, q + 1, q + n, k + width, k + width + n - 1)


def split_squares(piece: TilePiece, largest: int) -> Iterator[TilePiece]:
    """Splits a square of more than ``largest`` rows along its diagonal, again and again; other pieces stay whole.

    Each split gives two smaller squares and the full square beside them. It is for kernels that do not skip what lies
    behind a diagonal closely.
    """
    rows = piece.q_stop - piece.q_start
    if piece.shape not in SQUARES or rows <= largest:
        yield piece
        return
    q, k = piece.q_start + rows // 2, piece.k_start + rows // 2
    yield from split_squares(replace(piece, q_stop=q, k_stop=k), largest)
    yield from split_squares(replace(piece, q_start=q, k_start=k), largest)
    if piece.shape is PieceShape.CAUSAL:
        yield TilePiece(PieceShape.FULL, q, piece.q_stop, piece.k_start, k)
    else:
        yield TilePiece(PieceShape.FULL, piece.q_start, q, k, piece.k_stop)
