"""Defines what the ranks of a run know of one step: each by itself, and all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

from longctx.comm.rank_numbers import gather_numbers


@dataclass(frozen=True)
class RankCounts:
    """Holds the facts of one step that one rank knows by itself.

    ``reports_work``: the report shows its work. ``cells``: attention cells of its own queries, 0 where another rank
    counts them. ``work``: cells that it computed. ``longest_document``: tokens of the longest document of
    which it holds some. ``valid_tokens``, ``physical_tokens``: what it holds, without and with padding. ``tokens``,
    ``full_cells``: of whole sequences, 0 on all but the first rank of a sequence group. ``sent_bytes``,
    ``bytes_between_nodes``: what its attention sent, and what of that went to other nodes. ``memory_peak_bytes``: None
    where it is unknown. ``stop``: it was asked to end. ``save``: by its clock it is time for a checkpoint.
    """

    reports_work: bool
    cells: float
    work: float
    longest_document: int
    valid_tokens: int
    physical_tokens: int
    tokens: int
    full_cells: int
    sent_bytes: int
    bytes_between_nodes: int
    memory_peak_bytes: int | None
    stop: bool
    save: bool

    def gathered(self, group: dist.ProcessGroup, device: torch.device) -> list[RankCounts]:
        """Gathers the counts of every rank, by rank, in one collective; integers are exact below 2^53."""
        names = [field.name for field in fields(self)]
        # A rank may know its memory where another does not; -1 stands for None on the way.
        own = [-1 if (value := getattr(self, name)) is None else value for name in names]
        return [RankCounts._of(dict(zip(names, row, strict=True))) for row in gather_numbers(own, group, device)]

    @classmethod
    def _of(cls, numbers: dict[str, float]) -> RankCounts:
        """Builds the counts from the numbers that travelled, by name."""
        memory = numbers.pop("memory_peak_bytes")
        exact: dict[str, Any] = {
            name: value if name in ("cells", "work") else int(value) for name, value in numbers.items()
        }
        exact |= {name: bool(exact[name]) for name in ("reports_work", "stop", "save")}
        return cls(**exact, memory_peak_bytes=None if memory < 0 else int(memory))


@dataclass(frozen=True)
class Observation:
    """Holds the facts of one step that all ranks know, equal on all of them.

    ``tokens``: of the global batch, those without a label included. ``balance``: most attention work of a rank over the
    mean. ``straggler``: tokens of the longest document of the busiest rank. ``padding``: share of the physical tokens
    that are none. ``comm_bytes``, ``comm_bytes_between_nodes``: what attention sent, all ranks together. ``stop``:
    somebody was asked to stop. ``save``: by the first rank's clock it is time for a checkpoint.

    These are of each rank that reports its work. ``work``: cells that it computes. ``bytes``: what its attention sent.
    ``bytes_between_nodes``: what of that went to other nodes.
    """

    tokens: int
    cells: int
    full_cells: int
    balance: float
    work: list[float]
    bytes: list[int]
    bytes_between_nodes: list[int]
    straggler: int
    padding: float
    comm_bytes: int
    comm_bytes_between_nodes: int
    memory_peak_bytes: int | None
    stop: bool
    save: bool

    @classmethod
    def of(cls, ranks: Sequence[RankCounts]) -> Observation:
        """Puts together what all ranks of the world counted."""
        telling = [rank for rank in ranks if rank.reports_work]
        work = [rank.work for rank in telling]
        memories = [rank.memory_peak_bytes for rank in ranks]
        known = [memory for memory in memories if memory is not None]
        return cls(
            tokens=sum(rank.tokens for rank in ranks),
            cells=int(sum(rank.cells for rank in telling)),
            full_cells=sum(rank.full_cells for rank in ranks),
            balance=max(work) * len(work) / sum(work) if sum(work) else 1.0,
            work=work,
            bytes=[rank.sent_bytes for rank in telling],
            bytes_between_nodes=[rank.bytes_between_nodes for rank in telling],
            straggler=max(telling, key=lambda rank: rank.work).longest_document,
            padding=1.0 - sum(rank.valid_tokens for rank in telling) / sum(rank.physical_tokens for rank in telling),
            comm_bytes=sum(rank.sent_bytes for rank in ranks),
            comm_bytes_between_nodes=sum(rank.bytes_between_nodes for rank in ranks),
            memory_peak_bytes=max(known) if len(known) == len(memories) else None,
            stop=any(rank.stop for rank in ranks),
            save=ranks[0].save,
        )
