"""Tiles: every allowed cell exactly once and nothing else, under any cut."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from longctx.sequence import Contiguous, Mask, Rows, Striped, Tile, TileSet, Zigzag
from tests.sequence.brute_force import Example, allowed, allowed_cells, examples, tile_cells


def global_cells(plan, tile_sets, q_rank: int, k_rank: int, row: int) -> list[tuple[int, int]]:
    queries, keys = plan.positions(q_rank), plan.positions(k_rank)
    return [
        (int(queries[q]), int(keys[k]))
        for tile_set in tile_sets
        if tile_set.batch_start <= row < tile_set.batch_stop
        for tile in tile_set.tiles
        for q, k in tile_cells(tile)
    ]


def check_cover(example: Example) -> None:
    plan = example.plan()
    ranks = range(example.world)
    for row, lengths in enumerate(example.packing):
        cells = []
        for q_rank, k_rank in itertools.product(ranks, ranks):
            cells += global_cells(plan, plan.tiles(q_rank, k_rank), q_rank, k_rank, row)
        assert len(cells) == len(set(cells)), "a cell is computed twice"
        assert set(cells) == allowed_cells(list(lengths), example.mask, example.length)


@given(examples())
def test_tiles_of_all_rank_pairs_cover_each_allowed_cell_once(example):
    check_cover(example)


def test_documents_that_end_on_shard_edges_and_single_tokens():
    for layout, world, causal in itertools.product(
        (Contiguous(), Zigzag(), Striped(), Striped(4)), (2, 3, 4, 8), (True, False)
    ):
        for packing in ((8, 8, 16), (16, 1, 15), (1,) * 32, (4, 4, 1, 3, 12), (32,), ()):
            for window in (None, 1, 8):
                check_cover(Example((packing,), Mask(causal, window), layout, 32, world))


@given(examples())
def test_counts_and_bands_of_tiles_are_those_of_their_cells(example):
    plan = example.plan()
    for q_rank in range(example.world):
        cells = 0
        for k_rank in range(example.world):
            for tile_set in plan.tiles(q_rank, k_rank):
                assert 0 <= tile_set.batch_start < tile_set.batch_stop <= len(example.packing)
                assert tile_set.tiles
                for tile in tile_set.tiles:
                    check_tile(tile, len(plan.positions(q_rank)), len(plan.positions(k_rank)))
                cells += tile_set.cells
        assert plan.work(q_rank) == cells
        assert cells == sum(
            allowed(list(lengths), example.mask, int(query), key)
            for lengths in example.packing
            for query in plan.positions(q_rank)
            for key in range(example.length)
        )


def check_tile(tile: Tile, queries: int, keys: int) -> None:
    assert 0 <= tile.q_start < tile.q_stop <= queries and 0 <= tile.k_start < tile.k_stop <= keys
    cells = tile_cells(tile)
    assert tile.cells == len(cells)
    assert tile.first_keys == sum(query == tile.q_start for query, _ in cells)
    low, high = tile.band
    band = [
        (tile.q_start + i, tile.k_start + j)
        for i in range(tile.queries)
        for j in range(tile.keys)
        if (low is None or j - i >= low) and (high is None or j - i <= high)
    ]
    assert sorted(cells) == band
    # A tile that both diagonals leave whole would be a full tile; a key that nobody sees would be read in vain.
    assert {key for _, key in cells} == set(range(tile.k_start, tile.k_stop))


@given(examples())
def test_reads_are_exactly_the_keys_that_a_rank_sees(example):
    plan = example.plan()
    for reader, owner in itertools.product(range(example.world), repeat=2):
        expected = {
            place
            for place, key in enumerate(plan.positions(owner).tolist())
            for lengths in example.packing
            if any(allowed(list(lengths), example.mask, query, key) for query in plan.positions(reader).tolist())
        }
        rows = plan.reads(reader, owner)
        assert {row for start, stop in rows.intervals for row in range(start, stop)} == expected
        assert len(rows) == len(expected)


@given(examples(longest=24), st.data())
def test_packed_tiles_index_the_buffer_of_the_rows_they_are_packed_into(example, data):
    plan = example.plan()
    extra = data.draw(st.sets(st.integers(0, plan.shard)))
    for reader, owner in itertools.product(range(example.world), repeat=2):
        held = {row for start, stop in plan.reads(reader, owner).intervals for row in range(start, stop)}
        held |= {row for row in extra if row < len(plan.positions(owner))}
        buffer = sorted(held)
        rows = Rows.union((row, row + 1) for row in buffer)
        for tile_set, packed in zip(plan.tiles(reader, owner), plan.packed_tiles(reader, owner, rows), strict=True):
            assert (tile_set.batch_start, tile_set.batch_stop) == (packed.batch_start, packed.batch_stop)
            for tile, moved in zip(tile_set.tiles, packed.tiles, strict=True):
                assert tile_cells(tile) == [(query, buffer[key]) for query, key in tile_cells(moved)]


def test_rows_of_a_batch_with_one_structure_are_one_set():
    plan = Example(((6, 2), (6, 2), (8,), (), (6, 2)), Mask(), Contiguous(), 8, 1).plan()
    assert [(one.batch_start, one.batch_stop) for one in plan.tiles(0, 0)] == [(0, 2), (2, 3), (4, 5)]


def test_the_causal_masks_of_the_papers_are_single_tiles():
    """Striped: a causal square with or without its diagonal; zigzag and contiguous: squares and rectangles."""
    plan = Example(((32,),), Mask(), Striped(), 32, 4).plan()
    assert plan.tiles(2, 1) == (TileSet(0, 1, (Tile(0, 8, 0, 8, upper=True),)),)
    assert plan.tiles(1, 2) == (TileSet(0, 1, (Tile(1, 8, 0, 7, upper=True),)),)
    plan = Example(((32,),), Mask(), Contiguous(), 32, 4).plan()
    assert plan.tiles(2, 1) == (TileSet(0, 1, (Tile(0, 8, 0, 8),)),)
    assert plan.tiles(1, 2) == ()
    plan = Example(((32,),), Mask(), Zigzag(), 32, 4).plan()
    assert plan.tiles(2, 1) == (TileSet(0, 1, (Tile(0, 8, 0, 4),)),)
    assert plan.tiles(1, 2) == (TileSet(0, 1, (Tile(4, 8, 0, 8),)),)


def test_a_window_is_the_triangle_of_its_beginning_and_one_band():
    plan = Example(((40,),), Mask(window=5), Contiguous(), 40, 1).plan()
    beginning, band = Tile(0, 5, 0, 5, upper=True), Tile(5, 40, 1, 40, lower=True, upper=True)
    assert plan.tiles(0, 0) == (TileSet(0, 1, (beginning, band)),)
