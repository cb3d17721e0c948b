"""Cuts whole sequences into this rank's share of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longctx.config import Config
from longctx.mesh import Mesh
from longctx.parallel.core import layout_of, mask_of
from longctx.sequence import Batch, Documents, Layout, LocalBatch, Mask, SequencePlan, cut, make_plan


@dataclass(frozen=True)
class BatchSharder:
    """Cuts whole batches for one rank of a sequence group and moves its share to the device.

    ``multiple``: what the shard length is a multiple of, for tensor parallelism cuts it again.
    """

    layout: Layout
    mask: Mask
    rank: int
    size: int
    device: torch.device
    multiple: int = 1

    @classmethod
    def of(cls, config: Config, mesh: Mesh, device: torch.device) -> BatchSharder:
        """Takes layout and mask from the configuration, and the rank's place from the mesh."""
        multiple = mesh.tensor.size()
        return cls(layout_of(config), mask_of(config), mesh.sequence_rank, mesh.sequence_size, device, multiple)

    def plan(self, batch: Batch) -> SequencePlan:
        """Plans the whole batch, the same on every rank, in host memory alone."""
        length = batch.tokens.shape[1]
        return make_plan(batch.documents, self.mask, self.layout, length, self.size, self.multiple)

    def __call__(self, batch: Batch, plan: SequencePlan | None = None) -> LocalBatch:
        """Cuts ``[B, S]`` to this rank's ``[B, T/SP]``; ``plan``: the batch's, where it has been made before."""
        local = cut(batch, plan or self.plan(batch), self.rank)
        return replace(
            local,
            tokens=local.tokens.to(self.device, non_blocking=True),
            labels=local.labels.to(self.device, non_blocking=True),
            positions=local.positions.to(self.device, non_blocking=True),
        )


def plan_of_batch(config: Config, documents: tuple[Documents, ...], length: int) -> SequencePlan:
    """Plans a batch of so many tokens a row as ``BatchSharder.plan`` does, where there is no mesh."""
    return make_plan(
        documents, mask_of(config), layout_of(config), length, config.parallel.sp, multiple=config.parallel.tp
    )
