"""How benchmarks tell a timing."""

from __future__ import annotations

from collections.abc import Mapping


def spread(timing: Mapping[str, float], scale: float, form: str) -> str:
    """Median and, of several, the range: 901 (859-959). ``timing``: the fields of a ``Timing``; ``scale``: what its
    numbers are multiplied by."""
    low, median, high = (format(timing[name] * scale, form) for name in ("low", "median", "high"))
    return f"{median} ({low}-{high})" if timing["repeats"] > 1 else f"{median} (once)"
