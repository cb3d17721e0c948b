"""Draws the report's part about balance: what attention cost each rank in the step that was balanced worst."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longctx.reporting.report.run_files import numbers_below
from longctx.reporting.report.templating import fill
from longctx.reporting.units import quantity

if TYPE_CHECKING:
    from markupsafe import Markup

_BY_RANK = ("work_by_rank", "bytes_by_rank", "bytes_between_nodes_by_rank")
_MOST = 64  # ranks that are shown
_OPEN = 8  # ranks whose table is open from the start


@dataclass(frozen=True)
class RankShare:
    """Holds what one rank computed over the mean of all, its bar's length from 0 to 1, and what it sent."""

    rank: int
    share: float
    length: float
    within: str
    across: str


def balance_section(records: Iterable[dict[str, Any]]) -> Markup | str:
    """Draws a bar for each rank; nothing, where no step of ``metrics.jsonl`` tells of more than one rank."""
    told = [record for record in records if _is_told(record)]
    if not told:
        return ""
    worst = max(told, key=lambda record: max(record["work_by_rank"]) / sum(record["work_by_rank"]))
    work = worst["work_by_rank"]
    return fill(
        "balance.html.jinja",
        step=worst["step"],
        largest=max(work) * len(work) / sum(work),
        ranks=_busiest(*(worst[key] for key in _BY_RANK)),
        world=len(work),
        straggler=quantity(worst["straggler_tokens"]),
        padding=worst["padding"],
        open=len(work) <= _OPEN,
    )


def _busiest(work: list[float], sent: list[float], across: list[float]) -> list[RankShare]:
    """Returns the busiest ranks, by rank."""
    mean, largest = sum(work) / len(work), max(work)
    busiest = sorted(range(len(work)), key=lambda rank: -work[rank])[:_MOST]
    return [
        RankShare(
            rank,
            work[rank] / mean,
            work[rank] / largest,
            f"{quantity(sent[rank] - across[rank])}B",
            f"{quantity(across[rank])}B",
        )
        for rank in sorted(busiest)
    ]


def _is_told(record: dict[str, Any]) -> bool:
    """Tells whether the balance of a step is there, as a run writes it."""
    told = [record.get(key) for key in _BY_RANK]
    work, sent, across = (column if type(column) is list else [] for column in told)
    if not len(work) == len(sent) == len(across) > 1:
        return False
    numbers = [*work, *sent, *across, record.get("straggler_tokens"), record.get("padding")]
    return numbers_below(numbers, 2**63) and sum(work) > 0
