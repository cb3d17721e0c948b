"""A single-device decoder on a mesh: what is done to it, in the only order that works."""

from __future__ import annotations

from longctx.attention import StrategyAttention
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.model import Decoder
from longctx.parallel.data import shard_parameters
from longctx.parallel.offload import offload_activations
from longctx.parallel.recompute import names_kept, recompute_activations
from longctx.parallel.tensor import split_tensors
from longctx.parallel.tiled_mlp import tile_mlps


def parallelize(model: Decoder, config: Config, mesh: Mesh) -> Decoder:
    """Changes ``model`` in place and returns it; ``config`` is resolved for the world of ``mesh``.

    Each step wraps the one before: what is recomputed is the parallel block, what is compiled holds its
    recomputation, and the gathering of parameters stays outside of both. Stages of a pipeline come first once
    they exist; the configuration refuses them until then.
    """
    attention, train = config.attention, config.train
    split_tensors(model, mesh.tensor)
    model.set_attention(StrategyAttention(attention.strategy, mesh.sequence_group, attention.kernel))
    tile_mlps(model, train.mlp_chunk, mesh.tensor.size())
    if train.recompute != "none":
        recompute = offload_activations if train.offload else recompute_activations
        recompute(model, names_kept(train.recompute, train.recompute_keep))
    if train.compile:
        compile_blocks(model)
    shard_parameters(model, mesh.parameters, train.dtype)
    return model


def compile_blocks(model: Decoder, backend: str = "inductor") -> None:
    """Compiles each block as one graph, attention being one node of it; equal blocks share their code.

    Raises torch's own error where a block would break into several graphs.
    """
    import torch

    for block in model.layers:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
