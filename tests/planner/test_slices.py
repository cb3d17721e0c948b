"""Slices against cells counted one by one; cuts partition them."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ConfigError
from longctx.planner import Slice, causal, full, prefix_lm, shared_prefix, window
from longctx.planner.slices import areas

small = st.integers(-6, 14)
slices = st.builds(
    lambda q0, rows, k0, keys, lo, width: Slice(q0, q0 + rows, k0, k0 + keys, lo, lo + width),
    st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), small, st.integers(-1, 20),
)  # fmt: skip


def cells(one):
    return {
        (q, k) for q in range(one.q0, one.q1) for k in range(one.k0, one.k1) if one.lo <= k - q <= one.hi
    }  # fmt: skip


@given(slices)
def test_area_counts_cells(one):
    assert one.area == len(cells(one))
    assert areas(*(np.array([value]) for value in astuple(one)))[0] == one.area


@given(slices, st.integers(-2, 22))
def test_cuts_partition_the_cells(one, at):
    for left, right in (one.cut_q(at), one.cut_k(at)):
        assert cells(left) | cells(right) == cells(one)
        assert not cells(left) & cells(right)


@given(slices)
def test_trimmed_is_the_smallest_rectangle(one):
    inside = cells(one)
    small = one.trimmed()
    assert cells(small) == inside
    if inside:
        assert {q for q, _ in inside} == set(range(small.q0, small.q1))
        assert {k for _, k in inside} == set(range(small.k0, small.k1))
        assert small.trimmed() == small
    else:
        assert small.area == 0


def seen(mask, doc):
    return set().union(*(cells(one) for one in mask.of(doc)))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 14))
def test_builders(lengths, size):
    prefixes = [min(size, n) for n in lengths]
    rules = {
        "causal": (causal(lengths), lambda d, q, k: k <= q),
        "full": (full(lengths), lambda d, q, k: True),
        "window": (window(lengths, size), lambda d, q, k: q - size < k <= q),
        "two-sided": (window(lengths, size, two_sided=True), lambda d, q, k: abs(q - k) < size),
        "prefix": (prefix_lm(lengths, prefixes), lambda d, q, k: k <= q or max(q, k) < prefixes[d]),
    }
    for mask, rule in rules.values():
        for doc, n in enumerate(lengths):
            assert seen(mask, doc) == {(q, k) for q in range(n) for k in range(n) if rule(doc, q, k)}
            assert sum(one.area for one in mask.of(doc)) == len(seen(mask, doc)), "slices are disjoint"


@given(*[st.integers(1, 6)] * 3)
def test_rejected_rows_do_not_see_chosen_ones(prompt, chosen, rejected):
    mask = shared_prefix([prompt], [chosen], [rejected])
    answer = prompt + chosen
    wanted = {
        (q, k) for q in range(answer + rejected) for k in range(q + 1) if not (q >= answer and prompt <= k < answer)
    }
    assert seen(mask, 0) == wanted
    assert mask.of(0)[0].area + mask.of(0)[1].area + mask.of(0)[2].area == len(wanted)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12), st.integers(1, 5))
def test_rows_have_their_own_cells(length, a, b, size):
    low, high = sorted((min(a, length), min(b, length)))
    for mask in (causal([3, length]), window([3, length], size), prefix_lm([3, length], [1, length // 2])):
        wanted = sum(low <= q < high for q, _ in seen(mask, 1))
        assert mask.rows_area(1, low, high) == wanted
        assert mask.area(np.array([1]), np.array([low]), np.array([high]))[0] == wanted


def test_areas_do_not_overflow():
    length = 1 << 24
    assert Slice(0, length, 0, length, -length, 0).area == length * (length + 1) // 2
    assert causal([length]).area(np.array([0]), np.array([0]), np.array([length]))[0] == length * (length + 1) // 2


def test_what_is_no_mask_is_refused():
    for wrong in (
        lambda: causal([0]),
        lambda: window([4], 0),
        lambda: prefix_lm([4], [5]),
        lambda: prefix_lm([4], [1, 1]),
        lambda: shared_prefix([4], [1, 1], [1]),
    ):
        with pytest.raises(ConfigError):
            wrong()
