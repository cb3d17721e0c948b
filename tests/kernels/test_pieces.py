"""Pieces cover each tile's cells exactly once and, masked bands apart, hold nothing else."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels import pieces
from longctx.kernels.pieces import NARROW_WINDOW, SQUARES, PieceShape, TilePiece, pieces_of, split_squares
from longctx.sequence import Tile
from tests.sequence.brute_force import tile_cells


def piece_cells(piece: TilePiece) -> list[tuple[int, int]]:
    """Cells by the sentences of ``PieceShape``."""
    n, m = piece.q_stop - piece.q_start, piece.k_stop - piece.k_start
    assert n > 0 and m > 0
    if piece.shape in (PieceShape.CAUSAL, PieceShape.ANTICAUSAL):
        assert n == m, f"{piece} is not a square"
    width = m - n + 1
    sees = {
        PieceShape.FULL: lambda i, j: True,
        PieceShape.CAUSAL: lambda i, j: j <= i,
        PieceShape.ANTICAUSAL: lambda i, j: j >= i,
        PieceShape.BAND: lambda i, j: i <= j < i + width,
    }[piece.shape]
    return [(piece.q_start + i, piece.k_start + j) for i in range(n) for j in range(m) if sees(i, j)]


def check(tile: Tile) -> None:
    covered = Counter(cell for piece in pieces_of(tile) for cell in piece_cells(piece))
    assert covered == Counter(tile_cells(tile))


@st.composite
def tiles(draw, longest: int) -> Tile:
    n, first = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    lower, upper = (n > 1 and draw(st.booleans()) for _ in range(2))
    keys = max(first + n - 1 if upper else first, n if lower else 1)
    return Tile(5, 5 + n, 7, 7 + keys, lower, upper)


@given(tiles(60))
def test_pieces_cover_each_cell_once(tile):
    check(tile)


@settings(max_examples=60)
@given(tiles(40))
def test_wide_bands_by_triangles_cover_each_cell_once(tile):
    narrow, pieces.NARROW_WINDOW = pieces.NARROW_WINDOW, 5
    try:
        check(tile)
    finally:
        pieces.NARROW_WINDOW = narrow


@pytest.mark.parametrize("width", [1, 2, 127, 128, 129])
@pytest.mark.parametrize("queries", [2, 127, 128, 129, 257])
def test_windows_around_the_narrow_one(width, queries):
    tile = Tile(0, queries, 0, queries + width - 1, lower=True, upper=True)
    check(tile)
    shapes = {piece.shape for piece in pieces_of(tile)}
    assert (PieceShape.BAND in shapes) == (width < NARROW_WINDOW)
    if width < NARROW_WINDOW:
        assert shapes == {PieceShape.BAND}


def test_masked_pieces_are_no_longer_than_a_chunk():
    tile = Tile(0, 5000, 0, 5000 + 16 - 1, lower=True, upper=True)
    for piece in pieces_of(tile):
        assert piece.q_stop - piece.q_start <= NARROW_WINDOW
        assert piece.k_stop - piece.k_start <= NARROW_WINDOW + 15


@given(st.sampled_from(SQUARES), st.integers(1, 70), st.integers(1, 20))
def test_halves_of_a_square_cover_its_cells_once(shape, rows, largest):
    whole = TilePiece(shape, 3, 3 + rows, 5, 5 + rows)
    parts = list(split_squares(whole, largest))
    assert Counter(cell for part in parts for cell in piece_cells(part)) == Counter(piece_cells(whole))
    assert all(part.q_stop - part.q_start <= largest for part in parts if part.shape in SQUARES)


def test_what_is_no_square_stays_whole():
    full = TilePiece(PieceShape.FULL, 0, 900, 0, 400)
    assert list(split_squares(full, 256)) == [full]
