"""Layouts partition any length, and say what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.catalog import LAYOUTS
from longctx.errors import ConfigError
from longctx.sequence import Contiguous, Documents, Explicit, Layout, Mask, Striped, Zigzag, make_layout, make_plan
from longctx.sequence.layout import shard_length
from tests.sequence.brute_force import layouts


@st.composite
def cuts(draw):
    length, world = draw(st.integers(1, 200)), draw(st.integers(1, 17))
    return draw(layouts(length, world)), length, world


@given(cuts())
def test_layouts_partition_every_length(cut):
    layout, length, world = cut
    shards = [layout.positions(length, world, rank) for rank in range(world)]
    for positions in shards:
        assert positions.dtype == np.int64
        assert (np.diff(positions) > 0).all(), "positions ascend"
    assert sorted(np.concatenate(shards).tolist()) == list(range(length))
    assert isinstance(layout, Layout) and isinstance(hash(layout), int)


@given(st.integers(1, 300), st.integers(1, 17), st.integers(1, 9))
def test_shards_are_as_equal_as_their_blocks_allow(length, world, block):
    def spread(layout):
        sizes = [len(layout.positions(length, world, rank)) for rank in range(world)]
        return max(sizes) - min(sizes)

    assert spread(Contiguous()) <= 1
    assert spread(Zigzag()) <= 2
    assert spread(Striped(block)) <= block


@given(st.integers(1, 6), st.integers(1, 6))
def test_equal_shards_are_the_published_layouts(world, chunk):
    length = 2 * world * chunk
    chunks = np.arange(length).reshape(2 * world, chunk)
    for rank in range(world):
        contiguous = chunks[2 * rank : 2 * rank + 2].reshape(-1)
        zigzag = np.concatenate([chunks[rank], chunks[2 * world - 1 - rank]])
        assert Contiguous().positions(length, world, rank).tolist() == contiguous.tolist()
        assert Zigzag().positions(length, world, rank).tolist() == zigzag.tolist()
        assert Striped().positions(length, world, rank).tolist() == list(range(rank, length, world))


def test_stripes_of_a_block_are_dealt_round_robin():
    assert Striped(3).positions(14, 2, 0).tolist() == [0, 1, 2, 6, 7, 8, 12, 13]
    assert Striped(3).positions(14, 2, 1).tolist() == [3, 4, 5, 9, 10, 11]
    assert Striped(3).positions(2, 2, 1).tolist() == []


def test_shard_length_is_at_least_one_and_a_multiple():
    assert shard_length(Contiguous(), 1, 8) == 1
    assert shard_length(Contiguous(), 9, 2) == 5
    assert shard_length(Contiguous(), 9, 2, 4) == 8
    assert shard_length(Striped(4), 9, 2, 2) == 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_make_layout_knows_every_name(name):
    assert make_layout(name).name == name


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make_layout("ziggurat"), r"=ziggurat is not known; .*valid: contiguous, zigzag, striped"),
        (lambda: make_layout("zigzag", 4), "layout_block 4 applies to the striped layout, not to zigzag"),
        (lambda: make_layout("striped", 0), "layout_block 0 must be at least 1 token"),
        (lambda: Striped(-2), "layout_block -2 must be at least 1 token"),
        (lambda: Explicit((((0, 3),), ((4, 6),))), r"\[4, 6\) follows position 3; it must start at 3"),
        (lambda: Explicit((((0, 3),), ((2, 6),))), r"\[2, 6\) follows position 3; it must start at 3"),
        (lambda: Explicit((((0, 3), (3, 3)), ((3, 6),))), r"\[3, 3\) follows position 3.*at least one token"),
        (lambda: Explicit((((1, 3),),)), r"\[1, 3\) follows position 0; it must start at 0"),
        (lambda: Explicit((((4, 6), (0, 4)),)), "spans of rank 0 must ascend"),
        (
            lambda: Explicit((((0, 3),), ((3, 6),))).positions(6, 3, 0),
            "explicit layout is for 2 ranks and 6 tokens, not 3 and 6",
        ),
        (
            lambda: Explicit((((0, 3),), ((3, 6),))).positions(7, 2, 0),
            "explicit layout is for 2 ranks and 6 tokens, not 2 and 7",
        ),
    ],
)
def test_refusals_name_the_value_and_what_is_valid(act, message):
    with pytest.raises(ConfigError, match=message):
        act()


def test_an_explicit_layout_may_leave_ranks_empty():
    layout = Explicit((((0, 2), (5, 6)), (), ((2, 5),)))
    assert layout.positions(6, 3, 0).tolist() == [0, 1, 5]
    assert layout.positions(6, 3, 1).tolist() == []
    assert layout.positions(6, 3, 2).tolist() == [2, 3, 4]


class Broken(Contiguous):
    """A layout whose positions are whatever a test says."""

    name = "broken"

    def __init__(self, *shards):
        object.__setattr__(self, "shards", shards)

    def positions(self, length, world, rank):
        return self.shards[rank]

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def ints(*numbers):
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ((ints(0, 1, 2, 3), ints(0, 1, 2, 3)), "position 0 is on 2 ranks"),
        ((ints(0, 1), ints(3)), "position 2 is on 0 ranks"),
        ((ints(1, 0), ints(2, 3)), "rank 0 must ascend, got 1 before 0"),
        ((ints(0, 1, 1), ints(2, 3)), "rank 0 must ascend, got 1 before 1"),
        ((ints(0, 1), ints(2, 4)), r"rank 1 must lie in \[0, 4\), got 2..4"),
        ((ints(0, 1), [2, 3]), "rank 1 must be a NumPy array of int64, .* got list"),
        ((np.array([0.0, 1.0]), ints(2, 3)), "rank 0 must be a NumPy array of int64, .* got float64 of 1 dims"),
    ],
)
def test_a_layout_that_is_no_partition_is_refused_before_any_work(shards, message):
    with pytest.raises(ConfigError, match=f"layout broken of 4 tokens on 2 ranks: .*{message}"):
        make_plan((Documents.from_lengths([4]),), Mask(), Broken(*shards), 4, 2)
