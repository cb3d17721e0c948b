"""Gathers a few numbers of every rank, so that all ranks know them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_numbers(numbers: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[list[float]]:
    """Returns the ``numbers`` of each rank of ``group``, by rank; integers are exact below 2^53.

    Ranks decide by what all of them know, never by what only they see, so that all decide the same.
    """
    own = torch.tensor([numbers], dtype=torch.float64, device=device)
    everyone = own.new_empty(dist.get_world_size(group), len(numbers))
    dist.all_gather_single(everyone, own, group=group)
    rows: list[list[float]] = everyone.tolist()
    return rows
