"""The report's part about memory: a bar for each category at the peak of the measured step."""

from __future__ import annotations

import html
import json
from typing import Any

from longctx.reporting.memory import CATEGORIES
from longctx.reporting.progress import quantity

_WIDTH, _HEIGHT = 100, 4


def memory_section(text: str) -> str:
    """``text``: what ``memory.json`` holds. Nothing, where that is not what a run writes."""
    try:
        content = json.loads(text)
        step, ranks = int(content["step"]), [_checked(rank) for rank in content["ranks"]]
        fullest = max(ranks, key=lambda rank: rank["peak"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    rows = "".join(_row(label, fullest[name], fullest["peak"]) for name, label in CATEGORIES.items() if fullest[name])
    among = f"rank {fullest['rank']}, the fullest of {len(ranks)}" if len(ranks) > 1 else "the only rank"
    host = f"; {quantity(fullest['host'])}B of host buffers" if fullest["host"] else ""
    title = f"memory at the peak of step {step}: {quantity(fullest['peak'])}B"
    return (
        f"<figure><figcaption>{html.escape(title)} <small>{html.escape(among + host)}</small></figcaption>"
        f"<table>{rows}</table></figure>"
    )


def _checked(rank: Any) -> dict[str, int]:
    """One rank's numbers; a missing or strange one is an error."""
    numbers = {name: rank[name] for name in (*CATEGORIES, "peak", "rank", "host")}
    if any(type(number) is not int or not 0 <= number < 2**53 for number in numbers.values()) or not numbers["peak"]:
        raise ValueError("numbers of bytes are whole")
    return numbers


def _row(label: str, size: int, peak: int) -> str:
    bar = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{size / peak:.0%}">'
        f'<rect class="share" width="{_WIDTH * size / peak:.2f}" height="{_HEIGHT}"/></svg>'
    )
    return f"<tr><th>{html.escape(label)}</th><td>{quantity(size)}B</td><td>{size / peak:.1%}</td><td>{bar}</td></tr>"
