"""Draws the report's part about memory: a bar for each category at the peak of the measured step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longctx.reporting.memory import CATEGORIES
from longctx.reporting.report.templating import fill
from longctx.reporting.units import quantity

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class CategoryShare:
    """Holds the bytes of one category, and their share of the peak."""

    label: str
    size: str
    share: float


def memory_section(text: str) -> Markup | str:
    """Draws what ``memory.json`` holds; nothing, where ``text`` is not what a run writes there."""
    try:
        content = json.loads(text)
        step, ranks = int(content["step"]), [_checked(rank) for rank in content["ranks"]]
        fullest = max(ranks, key=lambda rank: rank["peak"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    peak = fullest["peak"]
    return fill(
        "memory.html.jinja",
        step=step,
        peak=f"{quantity(peak)}B",
        whose=f"rank {fullest['rank']}, the fullest of {len(ranks)}" if len(ranks) > 1 else "the only rank",
        host=f"{quantity(fullest['host'])}B" if fullest["host"] else "",
        categories=[
            CategoryShare(label, f"{quantity(fullest[name])}B", fullest[name] / peak)
            for name, label in CATEGORIES.items()
            if fullest[name]
        ],
    )


def _checked(rank: Any) -> dict[str, int]:
    """Returns one rank's numbers; a missing or strange one is an error."""
    numbers = {name: rank[name] for name in (*CATEGORIES, "peak", "rank", "host")}
    if any(type(number) is not int or not 0 <= number < 2**53 for number in numbers.values()) or not numbers["peak"]:
        raise ValueError("numbers of bytes are whole")
    return numbers
