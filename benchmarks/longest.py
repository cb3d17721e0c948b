"""Finds the longest sequence that fits by few probes: each is a process group that may be killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RESOLUTION = 16  # the search ends when the next step would be under a sixteenth of what fits


@dataclass(frozen=True)
class Longest:
    """Tells what was found: ``fits`` tokens do fit, ``fails`` tokens do not.

    ``fails`` None: no length failed up to the cap, so ``fits`` is a lower bound. ``fits`` is 0 where even ``unit``
    tokens do not fit.
    """

    fits: int
    fails: int | None


def longest(fits: Callable[[int], bool], start: int, cap: int, unit: int) -> Longest:
    """Gallops away from ``start`` by a sixteenth, two, four, ... of it until both are known, then bisects.

    Lengths are multiples of ``unit``, as ``start`` and ``cap`` are. A good guess costs two probes.
    """
    low, high = 0, cap + unit
    stride = max(unit, start // RESOLUTION // unit * unit)
    probe = min(start, cap)
    while low < probe < high:
        if fits(probe):
            low = probe
            probe = min(probe + stride, cap) if high > cap else probe
        else:
            high = probe
            probe = max(probe - stride, unit) if not low else probe
        stride *= 2
    while low and high <= cap and high - low > max(unit, low // RESOLUTION):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Longest(low, high if high <= cap else None)
