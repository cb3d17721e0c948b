"""Applies all parallelism to a single-device decoder, in the only order that works."""

from __future__ import annotations

from longctx.attention.strategies.disaggregated.pipeline import StageAttention
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.model import Decoder
from longctx.parallel.core import core_attention, linear_attention, ping_pong_attention
from longctx.parallel.data import shard_parameters
from longctx.parallel.offload import offload_activations
from longctx.parallel.ping_pong import take_turns
from longctx.parallel.pipeline import Pipeline, cut_into_stages
from longctx.parallel.recompute import names_kept, recompute_activations
from longctx.parallel.tensor import apply_tensor_parallel
from longctx.parallel.tiled_mlp import tile_mlps


def parallelize(model: Decoder, config: Config, mesh: Mesh) -> Decoder | Pipeline:
    """Changes ``model`` in place and returns it, or this rank's stages of it where there is a pipeline.

    ``config`` is resolved for the world of ``mesh``. Each step wraps the one before. What is recomputed is the parallel
    block, and what is compiled holds its recomputation. The gathering of parameters stays outside of both.
    """
    train = config.train
    pipeline = cut_into_stages(model, config, mesh) if config.parallel.pp > 1 else None
    device = next(model.parameters()).device
    cores = core_attention(config, mesh, device), linear_attention(config, mesh)
    if pipeline is not None and isinstance(cores[0], StageAttention):
        pipeline.servers = cores[0]
    for part in [model] if pipeline is None else pipeline.stages:
        apply_tensor_parallel(part, mesh.tensor)
        part.set_attention(*cores)
        if config.attention.ping_pong:
            take_turns(part, ping_pong_attention(config, mesh))
        tile_mlps(part, train.mlp_chunk, mesh.tensor.size())
        if train.recompute != "none":
            recompute = offload_activations if train.offload else recompute_activations
            recompute(part, names_kept(train.recompute, train.recompute_keep))
        if train.compile:
            compile_blocks(part)
        shard_parameters(part, mesh.parameters, train.dtype, keep_gathered=pipeline is not None)
    return model if pipeline is None else pipeline


def compile_blocks(model: Decoder, backend: str = "inductor") -> None:
    """Compiles each block as one graph, attention being one node of it; equal blocks share their code.

    Raises torch's own error where a block would break into several graphs.
    """
    import torch

    for block in model.layers:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
