"""Applies tensor parallelism: heads, hidden channels and vocabulary over the ranks of one axis, by DTensor plans.

Between blocks each rank holds its part of the local sequence, ``[B, T/SP/TP, dim]``. A norm works on that part and
gathers its output over the axis. The outputs of q, k, v, gate and up are split, and the inputs of attention_out and
mlp_out. The sum of their products is scattered back to parts of the sequence. The core of attention sees plain tensors
of all local tokens and its own heads, ``[B, T/SP, H/TP, D]``.

A block gathers twice and scatters twice per pass. ``recompute=full`` gathers both and scatters the first
again; ``selective`` keeps what they returned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from longctx.config import ModelConfig
from longctx.model import Block, Decoder, LinearBlock
from longctx.model.norms import PlusOneNorm
from longctx.parallel.vocabulary import ShardedVocabulary, sharded_lookup

TOKENS, HEADS = 1, 2  # dims of [B, T, H, D]
POST_NORMS = ("attention_post_norm", "mlp_post_norm")


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Splits ``model``, whose weights are whole and equal on all ranks, over the axis ``mesh``.

    Names and global shapes of parameters stay those of the single-device model.
    """
    if mesh.size() == 1:
        return
    styles: dict[str, ParallelStyle] = {"embedding": EmbeddingRows(), "norm": GatheredNorm(), "head": VocabularyRows()}
    # A tied model has no head, a pipeline stage only its own parts.
    outer_plan = {name: style for name, style in styles.items() if getattr(model, name) is not None}
    # Weights are whole here already, so that nothing has to be sent to split them.
    parallelize_module(model, mesh, outer_plan, src_data_rank=None)
    for block in model.layers:
        parallelize_module(block, mesh, block_parallel_plan(block, model.config, mesh.size()), src_data_rank=None)
        if isinstance(block, LinearBlock):
            split_heads(block, mesh)
    model.vocabulary = ShardedVocabulary(mesh)


def block_parallel_plan(block: Block, config: ModelConfig, degree: int) -> dict[str, ParallelStyle]:
    """Returns the parallel style of each module of a block."""
    plan: dict[str, ParallelStyle] = {
        "attention_norm": GatheredNorm(),
        "attention_out": RowwiseParallel(output_layouts=Shard(TOKENS)),
        "mlp_norm": GatheredNorm(),
        "gate": ColwiseParallel(),
        "up": ColwiseParallel(),
        "mlp_out": RowwiseParallel(output_layouts=Shard(TOKENS)),
    }
    # A norm of a branch's output works on this rank's part of the sequence, and leaves it there.
    plan |= {
        name: SequenceParallel(use_local_output=True) for name in POST_NORMS if config.norm_of(block.kind) != "pre"
    }
    if isinstance(block, LinearBlock):
        plan |= {f"projections.{name}": ColwiseParallel() for name in block.projections}
        plan["out_gate"] = ColwiseParallel()
        norms = ["out_norm"] if block.mixer.normed else []
    else:
        by_head = config.qk_norm and config.qk_norm_dim == "head"
        replicated, by_width = config.kv_heads < degree, config.qk_norm and not by_head
        plan["q"] = ColwiseParallel()
        plan["k"] = SharedHead(config, whole=by_width) if replicated else ColwiseParallel()
        plan["v"] = SharedHead(config) if replicated else ColwiseParallel()
        norms = ["q_norm", "k_norm"] if by_head else []
        if by_width:
            plan["q_norm"] = WidthNorm()
            plan["k_norm"] = SharedWidthNorm(config) if replicated else WidthNorm()
    # One weight for all heads: its gradient is a sum over the ranks. That includes shared heads, for each of their
    # copies brings only what its own queries ask of it.
    plan |= {name: SequenceParallel(sequence_dim=HEADS, use_local_output=True) for name in norms}
    return plan


def split_heads(block: LinearBlock, mesh: DeviceMesh) -> None:
    """Keeps only what is learned or fixed of this rank's own heads, ``[H/TP, ...]``."""
    for name, parameter in block.learned.items():
        part: Any = distribute_tensor(cast("Tensor", parameter), mesh, [Shard(0)], src_data_rank=None)
        block.learned[name] = nn.Parameter(part)
    for name, whole in block.named_buffers(recurse=False):
        own = len(whole) // mesh.size()
        block.own_heads = slice(mesh.get_local_rank() * own, (mesh.get_local_rank() + 1) * own)
        setattr(block, name, whole[block.own_heads])
    block.head_tensors = partial(_own_heads, block.head_tensors)  # type: ignore[method-assign]


def _own_heads(head_tensors: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: part.to_local() if isinstance(part, DTensor) else part for name, part in head_tensors().items()}


class GatheredNorm(SequenceParallel):
    """A norm that each rank computes for its part of the sequence; its output is whole on every rank.

    It takes ``[B, T/SP/TP, dim]`` and returns a DTensor ``[B, T/SP, dim]``, gathered once for all projections that read
    it. The sum of their gradients is scattered once.
    """

    @staticmethod
    def _prepare_output_fn(_use_local: bool, _module: nn.Module, output: DTensor, mesh: DeviceMesh) -> DTensor:
        return output.redistribute(mesh, [Replicate()])


class SharedHead(ParallelStyle):
    """A projection to fewer key/value heads than ranks: each rank computes the one head that its queries read.

    Query heads of rank r are ``r * H/TP ..``, key head of query head h is ``h * Hkv // H``, so the rank reads head
    ``r * Hkv // TP``. The weight is whole on every rank and its gradient is summed over them. Each has that of its own
    head. Of ranks that share a head, each has the part of its own queries. ``whole``: every rank computes all heads,
    where a norm over their width needs them.
    """

    def __init__(self, config: ModelConfig, whole: bool = False) -> None:
        super().__init__()
        self._heads, self._head_dim, self._whole = config.kv_heads, config.head_dim, whole

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute_parameters(module, mesh, Replicate())
        rows = slice(None) if self._whole else own_head(self._heads, self._head_dim, mesh)
        module.forward = partial(_project_rows, module, rows)
        return module


def own_head(heads: int, head_dim: int, mesh: DeviceMesh) -> slice:
    """Returns the channels of the key/value head that this rank's queries read, of fewer heads than ranks."""
    first = mesh.get_local_rank() * heads // mesh.size() * head_dim
    return slice(first, first + head_dim)


def _project_rows(module: nn.Module, rows: slice, x: DTensor) -> Tensor:
    """Projects a DTensor ``[B, T/SP, dim]``, whole on every rank, to ``[B, T/SP, D]``."""
    weight, bias = (_summed(module, name) for name in ("weight", "bias"))
    assert weight is not None, "a projection has a weight"
    return F.linear(x.to_local(grad_placements=[Partial()]), weight[rows], None if bias is None else bias[rows])


def _summed(module: nn.Module, name: str) -> Tensor | None:
    """Returns a parameter that is whole on every rank, and whose gradient is the sum of theirs."""
    parameter = getattr(module, name)
    return None if parameter is None else cast("DTensor", parameter).to_local(grad_placements=[Partial()])


class WidthNorm(ParallelStyle):
    """A norm over the width of all heads, of which each rank has its own: their squares are summed over the ranks.

    It maps ``[B, T/SP, H/TP * D]`` to the same; the weight is split as the width is.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute_parameters(module, mesh, Shard(0))
        module.forward = partial(_norm_width, module, mesh)
        return module


def _norm_width(module: Any, mesh: DeviceMesh, x: Tensor) -> Tensor:
    whole: Any = DTensor.from_local(
        x.to(torch.promote_types(x.dtype, torch.float32)), mesh, [Shard(-1)], run_check=False
    )
    mean: Any = whole.square().sum(-1, keepdim=True).redistribute(mesh, [Replicate()]) / whole.shape[-1]
    normed = whole * torch.rsqrt(mean + module.eps)
    scale = module.weight + 1.0 if isinstance(module, PlusOneNorm) else module.weight
    out: Tensor = (normed * scale).to_local().to(x.dtype)
    return out


class SharedWidthNorm(SharedHead):
    """A norm over the width of fewer key heads than ranks: each rank norms all of them and keeps its own.

    It maps ``[B, T/SP, Hkv * D]``, whole on every rank, to ``[B, T/SP, D]``.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute_parameters(module, mesh, Replicate())
        module.forward = partial(_norm_shared_width, module, own_head(self._heads, self._head_dim, mesh))
        return module


def _norm_shared_width(module: Any, rows: slice, x: Tensor) -> Tensor:
    weight = _summed(module, "weight")
    assert weight is not None, "a norm has a weight"
    scale = weight + 1.0 if isinstance(module, PlusOneNorm) else weight
    return F.rms_norm(x, module.normalized_shape, scale, module.eps)[..., rows]


class VocabularyRows(ParallelStyle):
    """A head whose weight ``[V, dim]`` is split by rows: each rank has ``[V/TP, dim]``, and the loss reads it."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        distribute_parameters(module, mesh, Shard(0))
        return module


class EmbeddingRows(VocabularyRows):
    """An embedding whose table is split by rows: it maps tokens ``[B, T/SP]`` to ``[B, T/SP/TP, dim]``."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, mesh)
        module.forward = partial(sharded_lookup, module, mesh)
        return module


def distribute_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Makes weight and bias DTensors; before, they are whole and equal on all ranks."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        placed: Any = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        setattr(module, name, nn.Parameter(placed))
