"""The search for the longest length that fits: the right answer in few probes."""

import pytest

from benchmarks.longest import Longest, longest


def search(limit: int, start: int, cap: int = 65536, unit: int = 512) -> tuple[Longest, list[int]]:
    asked: list[int] = []

    def fits(tokens: int) -> bool:
        asked.append(tokens)
        return tokens <= limit

    return longest(fits, start, cap, unit), asked


@pytest.mark.parametrize("limit", [512, 700, 2304, 12_345, 30_000, 65_535])
@pytest.mark.parametrize("start", [512, 4096, 65_536])
def test_what_is_found_fits_and_the_next_sixteenth_does_not(limit, start):
    found, asked = search(limit, start)
    assert found.fits <= limit < found.fails
    assert found.fails - found.fits <= max(512, found.fits // 16)
    assert found.fits % 512 == 0 and found.fails % 512 == 0
    assert len(asked) == len(set(asked)), "a probe costs minutes"
    assert len(asked) <= 14


def test_a_limit_beyond_the_cap_is_a_lower_bound():
    assert search(10**9, 4096) == (Longest(65536, None), [4096, 4608, 5632, 7680, 11776, 19968, 36352, 65536])
    assert search(10**9, 5120, cap=8192)[0] == Longest(8192, None)


def test_a_good_guess_costs_two_probes():
    assert search(20_000, 19_968) == (Longest(19_968, 20_992), [19_968, 20_992])


def test_nothing_fits():
    assert search(100, 2048) == (Longest(0, 512), [2048, 1536, 512])
