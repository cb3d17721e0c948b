"""Alternation and its statistics; no time is asserted."""

import pytest

from benchmarks.paired import Alternation, Ratio


def test_who_goes_first_alternates():
    order: list[str] = []
    alternation = Alternation(lambda number: order.append(f"other {number}"))
    for number in range(1, 5):
        order.append(f"own {number}")
        alternation.after_step()
    assert order == ["own 1", "other 1", "other 2", "own 2", "own 3", "other 3", "other 4", "own 4"]
    assert len(alternation.own) == len(alternation.others) == 4


def test_the_bound_lies_above_the_median_and_is_the_same_each_time():
    over, under = [1.0, 1.2, 1.1, 1.3, 1.05], [1.0] * 5
    ratio = Ratio.of(over, under)
    assert ratio.median == pytest.approx(1.1)
    assert 1.1 <= ratio.upper <= 1.3
    assert Ratio.of(over, under) == ratio


def test_equal_times_are_ratio_one():
    assert Ratio.of([2.0, 3.0], [2.0, 3.0]) == Ratio(1.0, 1.0)
