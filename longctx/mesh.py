"""Builds the mesh, which says which ranks shard what.

The root has the axes ``pp``, ``tokens``, ``tp``, outermost first. ``tokens`` joins the ranks of one pipeline
stage that hold different tokens. It is unflattened into ``dp_replicate`` and ``shard``, and ``shard`` into
``dp_shard`` and ``sp``. So parameters shard over ``dp_shard × sp`` by one plain axis. A sequence group is made of
neighbours, which a launcher places inside a node. A world of one is the same mesh, every axis of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longctx.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Holds the axes of one run's mesh, as one rank sees them.

    ``pipeline``: ranks that hold the stages of one model and read the same data. ``tokens``: ranks of one stage
    that hold different tokens, over which gradients are summed. ``parameters``: what FSDP2 shards over
    (``shard``), behind an axis of replicas when there are any. ``sequence``: ranks that share sequences.
    ``tensor``: ranks that hold the same tokens and split heads, hidden channels and vocabulary. ``data_rank`` of
    ``data_size``: which sequences this rank's group takes. ``axes``: all of them together.
    """

    pipeline: DeviceMesh
    tokens: DeviceMesh
    parameters: DeviceMesh
    sequence: DeviceMesh
    tensor: DeviceMesh
    data_rank: int
    data_size: int
    axes: DeviceMesh

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """Returns the process group of the ranks that hold the stages of one model."""
        return self.pipeline.get_group()

    @property
    def token_group(self) -> dist.ProcessGroup:
        """Returns the process group of the ranks of one stage that hold different tokens."""
        return self.tokens.get_group()

    @property
    def world_group(self) -> dist.ProcessGroup:
        """Returns the process group of all ranks: those of all tokens, and of all parts of the model."""
        world = dist.group.WORLD
        assert world is not None, "a mesh is built in a world"
        return world

    @property
    def leads_tensor(self) -> bool:
        """Tells whether this rank is the first of those that split one stage's weights over the same tokens."""
        return self.tensor.get_local_rank() == 0

    @property
    def counts_tokens(self) -> bool:
        """Tells whether this rank counts its tokens; of ranks with the same tokens, of any stage, one does."""
        return self.leads_tensor and self.pipeline.get_local_rank() == 0

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """Returns the process group of the ranks that share sequences."""
        return self.sequence.get_group()

    def servers(self) -> dist.ProcessGroup:
        """Makes the group of the ranks of all stages that share sequences, stage by stage.

        All ranks of the world call it at the same point.
        """
        joined: DeviceMesh = self.axes["pp", "sp"]._flatten("servers")
        return joined.get_group()

    @property
    def server_ranks(self) -> list[int]:
        """Lists the global ranks of the group that ``servers`` makes, in its order."""
        ranks: list[int] = self.axes["pp", "sp"].mesh.flatten().tolist()
        return ranks

    @property
    def sequence_rank(self) -> int:
        """Returns this rank's place in its sequence group."""
        return self.sequence.get_local_rank()

    @property
    def sequence_size(self) -> int:
        """Counts the ranks of a sequence group."""
        return self.sequence.size()


def build_mesh(parallel: ParallelConfig, device_type: str) -> Mesh:
    """Builds the mesh of a resolved configuration; every rank of the world calls it at the same point.

    ``device_type``: "cpu" or "cuda". ``torch.distributed`` has been initialised with a world of that size.
    """
    assert parallel.dp_shard > 0, "longctx.config.resolve fills in parallel.dp_shard"
    shard = parallel.dp_shard * parallel.sp
    tokens = parallel.dp_replicate * shard
    root = init_device_mesh(device_type, (parallel.pp, tokens, parallel.tp), mesh_dim_names=("pp", "tokens", "tp"))
    data = root._unflatten("tokens", (parallel.dp_replicate, shard), ("dp_replicate", "shard"))
    sequence = data._unflatten("shard", (parallel.dp_shard, parallel.sp), ("dp_shard", "sp"))
    replicas = sequence["dp_replicate"].get_local_rank()
    return Mesh(
        pipeline=root["pp"],
        tokens=root["tokens"],
        parameters=data["shard"] if parallel.dp_replicate == 1 else data["dp_replicate", "shard"],
        sequence=sequence["sp"],
        tensor=root["tp"],
        data_rank=replicas * parallel.dp_shard + sequence["dp_shard"].get_local_rank(),
        data_size=parallel.dp_replicate * parallel.dp_shard,
        axes=sequence,
    )
