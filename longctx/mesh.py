"""The mesh: which ranks shard what.

The root has the axes ``shares`` and ``tp``. ``shares`` joins all ranks whose shares of loss and gradient norm
add up; it is unflattened into ``pp``, outermost, and ``tokens``, which joins the ranks of one pipeline stage
that hold different tokens. ``tokens`` is unflattened into ``dp_replicate`` and ``shard``, and ``shard`` into
``dp_shard`` and ``sp``. So parameters shard over ``dp_shard × sp`` by one plain axis, and a sequence group is
made of neighbours, which a launcher places inside a node. A world of one is the same mesh, every axis of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longctx.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The axes of one run, seen from one rank.

    ``shares``: ``tokens`` of all pipeline stages, stage by stage. ``pipeline``: ranks that hold the stages of one
    model and read the same data. ``tokens``: ranks that hold different tokens, over which gradients are summed.
    ``parameters``:
    what FSDP2 shards over (``shard``), behind an axis of replicas when there are any. ``sequence``: ranks
    that share sequences. ``data_rank`` of ``data_size``: which sequences this rank's group takes.
    """

    shares: DeviceMesh
    pipeline: DeviceMesh
    tokens: DeviceMesh
    parameters: DeviceMesh
    sequence: DeviceMesh
    data_rank: int
    data_size: int

    @property
    def share_group(self) -> dist.ProcessGroup:
        return self.shares.get_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self.pipeline.get_group()

    @property
    def token_group(self) -> dist.ProcessGroup:
        return self.tokens.get_group()

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        return self.sequence.get_group()

    @property
    def sequence_rank(self) -> int:
        return self.sequence.get_local_rank()

    @property
    def sequence_size(self) -> int:
        return self.sequence.size()


def build_mesh(parallel: ParallelConfig, device_type: str) -> Mesh:
    """The mesh of a resolved configuration; every rank of the world calls it at the same point.

    ``device_type``: "cpu" or "cuda". ``torch.distributed`` has been initialised with a world of that size.
    """
    assert parallel.dp_shard > 0, "longctx.config.resolve fills in parallel.dp_shard"
    shard = parallel.dp_shard * parallel.sp
    tokens = parallel.dp_replicate * shard
    root = init_device_mesh(device_type, (parallel.pp * tokens, parallel.tp), mesh_dim_names=("shares", "tp"))
    staged = root._unflatten("shares", (parallel.pp, tokens), ("pp", "tokens"))
    data = staged._unflatten("tokens", (parallel.dp_replicate, shard), ("dp_replicate", "shard"))
    sequence = data._unflatten("shard", (parallel.dp_shard, parallel.sp), ("dp_shard", "sp"))
    replicas = sequence["dp_replicate"].get_local_rank()
    return Mesh(
        shares=root["shares"],
        pipeline=staged["pp"],
        tokens=staged["tokens"],
        parameters=data["shard"] if parallel.dp_replicate == 1 else data["dp_replicate", "shard"],
        sequence=sequence["sp"],
        data_rank=replicas * parallel.dp_shard + sequence["dp_shard"].get_local_rank(),
        data_size=parallel.dp_replicate * parallel.dp_shard,
    )
