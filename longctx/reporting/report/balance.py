"""The report's part about balance: what attention cost each rank in the step that was balanced worst."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from longctx.reporting.progress import quantity

_BY_RANK = ("work_by_rank", "bytes_by_rank", "bytes_between_nodes_by_rank")
_WIDTH, _HEIGHT, _MOST = 100, 4, 64  # of a bar; ranks that are shown


def balance_section(records: Iterable[dict[str, Any]]) -> str:
    """``records``: what ``metrics.jsonl`` holds. Nothing, where no step tells of more than one rank."""
    told = [record for record in records if _is_told(record)]
    if not told:
        return ""
    worst = max(told, key=lambda record: max(record["work_by_rank"]) / sum(record["work_by_rank"]))
    work, sent, across = (worst[key] for key in _BY_RANK)
    mean, largest = sum(work) / len(work), max(work)
    busiest = sorted(range(len(work)), key=lambda rank: -work[rank])[:_MOST]
    rows = "".join(
        _row(rank, work[rank] / mean, work[rank] / largest, sent[rank], across[rank]) for rank in sorted(busiest)
    )
    title = f"attention work by rank in step {worst['step']}, the worst balanced: {largest / mean:.3f} of the mean"
    among = (
        f"longest document of the busiest rank: {quantity(worst['straggler_tokens'])} tokens; "
        f"padding {worst['padding']:.1%}"
    )
    if len(work) > _MOST:
        among += f"; the {_MOST} busiest of {len(work)} ranks"
    return (
        f"<figure><figcaption>{html.escape(title)} <small>{html.escape(among)}</small></figcaption>"
        f"<table>{rows}</table></figure>"
    )


def _is_told(record: dict[str, Any]) -> bool:
    """Whether the balance of a step is there, as a run writes it."""
    told = [record.get(key) for key in _BY_RANK]
    work, sent, across = (column if type(column) is list else [] for column in told)
    if not len(work) == len(sent) == len(across) > 1:
        return False
    numbers = [*work, *sent, *across, record.get("straggler_tokens"), record.get("padding")]
    return all(type(number) in (int, float) and 0 <= number < 2**63 for number in numbers) and sum(work) > 0


def _row(rank: int, share: float, length: float, sent: float, across: float) -> str:
    bar = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{share:.3f}">'
        f'<rect class="share" width="{_WIDTH * length:.2f}" height="{_HEIGHT}"/></svg>'
    )
    hops = f"{quantity(sent - across)}B sent within the node, {quantity(across)}B to other nodes"
    return f"<tr><th>rank {rank}</th><td>{share:.3f}</td><td>{hops}</td><td>{bar}</td></tr>"
