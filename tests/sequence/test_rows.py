"""Sets of rows behave as Python's sets of integers do."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.sequence import Rows

numbers = st.sets(st.integers(0, 30))


def rows_of(members: set[int]) -> Rows:
    return Rows.union((row, row + 1) for row in members)


def members_of(rows: Rows) -> set[int]:
    return {row for start, stop in rows.intervals for row in range(start, stop)}


def check_canonical(rows: Rows) -> None:
    ends = [end for interval in rows.intervals for end in interval]
    assert all(low < high for low, high in itertools.pairwise(ends)), f"{rows} is not sorted, disjoint and apart"


@given(numbers, numbers)
def test_algebra_is_that_of_sets(a, b):
    for rows, expected in (
        (rows_of(a), a),
        (rows_of(a) | rows_of(b), a | b),
        (rows_of(a) - rows_of(b), a - b),
        (Rows.union((row, row + 1) for row in a), a),
    ):
        check_canonical(rows)
        assert members_of(rows) == expected
        assert len(rows) == len(expected)
        assert bool(rows) == bool(expected)
    assert (rows_of(a) == rows_of(b)) == (a == b)
    assert hash(rows_of(a)) == hash(Rows.union((row, row + 1) for row in a))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_union_takes_overlapping_touching_and_empty_intervals(intervals):
    rows = Rows.union(intervals)
    check_canonical(rows)
    assert members_of(rows) == {row for start, stop in intervals for row in range(start, stop)}


@given(numbers, numbers)
def test_inside_and_locate_number_by_place_in_the_packed_buffer(outer, chosen):
    inner, buffer = outer & chosen, sorted(outer)
    places = rows_of(inner).inside(rows_of(outer))
    check_canonical(places)
    assert members_of(places) == {buffer.index(row) for row in inner}
    for start, stop in rows_of(outer).intervals:
        assert rows_of(outer).locate(start, stop) == buffer.index(start)
        assert rows_of(outer).locate(stop - 1, stop) == buffer.index(stop - 1)


def test_locate_wants_rows_of_one_interval():
    rows = Rows(((2, 5), (7, 9)))
    for start, stop in ((1, 3), (4, 8), (5, 7), (8, 10)):
        with pytest.raises(AssertionError, match="are not within"):
            rows.locate(start, stop)


@given(numbers)
def test_take_and_add_to_are_indexing(members):
    index = sorted(members)
    for dim in (0, 1, 2):
        tensor = torch.randn(31, 31, 31)
        packed = rows_of(members).take(tensor, dim)
        assert torch.equal(packed, tensor.index_select(dim, torch.tensor(index, dtype=torch.int64)))
        target = torch.randn(31, 31, 31)
        expected = target.index_add(dim, torch.tensor(index, dtype=torch.int64), packed)
        rows_of(members).add_to(target, packed, dim)
        assert torch.equal(target, expected)


def test_take_of_one_interval_is_a_view():
    tensor = torch.randn(2, 9, 3)
    assert Rows(((3, 7),)).take(tensor)._base is tensor
    assert Rows().take(tensor).shape == (2, 0, 3)
