"""Halos: the few tokens before a rank's own that short convolutions and token shifts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.sequence.documents import Documents, Int64
from longctx.sequence.plan import SequencePlan
from longctx.sequence.rows import Rows
from longctx.sequence.views import view


@dataclass(frozen=True)
class Halo:
    """Describes one rank's tokens before its own, up to ``reach`` back.

    ``rows[owner]``: local rows of each owner that this rank reads, none of its own. An extended buffer holds the rank's
    ``shard`` rows and then those, by owner. ``index`` int64 ``[reach, shard]``: where in it the token w + 1 before each
    local one lies. ``seen`` bool ``[B, reach, shard]``: whether that is a token of the same document. Of those that are
    not, ``index`` names the token itself.
    """

    rows: tuple[Rows, ...]
    index: Tensor
    seen: Tensor

    @property
    def length(self) -> int:
        """Returns how many rows come from other ranks."""
        return sum(map(len, self.rows))

    def to(self, device: torch.device) -> Halo:
        return Halo(self.rows, self.index.to(device), self.seen.to(device))


def plan_halo(positions: Sequence[Int64], documents: Sequence[Documents], reader: int, reach: int, shard: int) -> Halo:
    """Plans the halo of one rank from the positions of all.

    ``positions``: ascending global ones of each rank's valid tokens; ``shard``: physical tokens of a rank.
    """
    own = positions[reader]
    starts = np.stack([row.bounds_of(own)[0] for row in documents])  # [B, n]
    back = own - np.arange(1, reach + 1)[:, None]  # [reach, n]
    seen = back >= starts[:, None]  # [B, reach, n]
    wanted = np.unique(back[seen.any(0)])
    held = [np.intersect1d(wanted, its, assume_unique=True) for its in positions]
    rows = [
        Rows.union((place, place + 1) for place in np.searchsorted(its, found).tolist()) if rank != reader else Rows()
        for rank, (its, found) in enumerate(zip(positions, held, strict=True))
    ]
    others = [found for rank, found in enumerate(held) if rank != reader]
    everywhere = np.concatenate([own, *others])
    places = np.concatenate([np.arange(len(own)), shard + np.arange(len(everywhere) - len(own))])
    order = np.argsort(everywhere)
    itself = np.arange(len(own))
    index = np.tile(np.arange(shard), (reach, 1))
    if len(own):
        near = np.minimum(np.searchsorted(everywhere[order], back), len(everywhere) - 1)
        index[:, : len(own)] = np.where(seen.any(0), places[order][near], itself)
    padded = np.zeros((len(documents), reach, shard), dtype=bool)
    padded[:, :, : len(own)] = seen
    return Halo(tuple(rows), torch.from_numpy(index), torch.from_numpy(padded))


CPU = torch.device("cpu")


@view
def halo_of(plan: SequencePlan, reader: int, reach: int, device: torch.device) -> Halo:
    """Returns the halo of ``reader`` for looking ``reach`` tokens back, with indices on ``device``."""
    if device != CPU:
        return halo_of(plan, reader, reach, CPU).to(device)
    return plan_halo([plan.positions(rank) for rank in range(plan.world)], plan.documents, reader, reach, plan.shard)
