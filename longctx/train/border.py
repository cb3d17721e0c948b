"""Where whole sequences become this rank's share of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longctx.attention import AttentionCase, get_strategy
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.sequence import Batch, Layout, LocalBatch, Mask, make_layout, shard


def layout_of(config: Config) -> Layout:
    """The layout that the configuration names, or the one that its strategy prefers."""
    attention = config.attention
    name = attention.layout or get_strategy(attention.strategy).layout
    return make_layout(name, attention.layout_block)


def mask_of(config: Config) -> Mask:
    """Decoders are causal; documents come with each batch."""
    return Mask(causal=True, window=config.attention.window)


def attention_case(config: Config) -> AttentionCase:
    """What the run asks of its attention strategy, on each rank."""
    heads, kv_heads = config.local_heads
    return AttentionCase(
        world=config.parallel.sp,
        heads=heads,
        kv_heads=kv_heads,
        layout=layout_of(config).name,
        mask=mask_of(config),
        documents=config.attention.document_mask,
    )


@dataclass(frozen=True)
class Border:
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
    def of(cls, config: Config, mesh: Mesh, device: torch.device) -> Border:
        multiple = mesh.tensor.size()
        return cls(layout_of(config), mask_of(config), mesh.sequence_rank, mesh.sequence_size, device, multiple)

    def __call__(self, batch: Batch) -> LocalBatch:
        """``[B, S]`` to ``[B, T/SP]``."""
        local = shard(batch, self.layout, self.mask, self.rank, self.size, self.multiple)
        return replace(
            local,
            tokens=local.tokens.to(self.device, non_blocking=True),
            labels=local.labels.to(self.device, non_blocking=True),
            positions=local.positions.to(self.device, non_blocking=True),
        )
