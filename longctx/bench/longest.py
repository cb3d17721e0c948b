"""The longest sequence that fits, by few probes: each is a process group that may be killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RESOLUTION = 16  # the search ends when the next step would be under a sixteenth of what fits


@dataclass(frozen=True)
class Longest:
    """``fits`` tokens do, ``fails`` tokens do not; None: none was found up to the cap, so ``fits`` is a lower bound.

    ``fits`` is 0 where even ``unit`` tokens do not fit.
    """

    fits: int
    fails: int | None


def longest(fits: Callable[[int], bool], start: int, cap: int, unit: int) -> Longest:
    """Doubles (or halves) from ``start``, then bisects to a sixteenth, in multiples of ``unit``."""
    low, high = 0, start
    while high <= cap and fits(high):
        low, high = high, min(2 * high, cap) if high < cap else cap + 1
    if high > cap:
        return Longest(low, None)
    while not low:
        half = high // 2 // unit * unit
        if not half:
            return Longest(0, high)
        low, high = (half, high) if fits(half) else (0, half)
    while high - low > max(unit, low // RESOLUTION):
        middle = (low + high) // 2 // unit * unit
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Longest(low, high)
