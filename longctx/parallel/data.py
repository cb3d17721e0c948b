"""Shards parameters, gradients and optimizer state over the ranks that hold different tokens (FSDP2)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from longctx.model import Decoder

# Arithmetic of the forward and backward pass; master weights and reductions are fp32 (fp64 for fp64).
COMPUTE_DTYPES = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}


def master_dtype(dtype: str) -> torch.dtype:
    """Returns the dtype of weights, sums of gradients and optimizer state."""
    return torch.float64 if dtype == "float64" else torch.float32


def compute_dtype(dtype: str) -> torch.dtype:
    """Returns the dtype of hidden states and of the computing in forward and backward pass."""
    return COMPUTE_DTYPES[dtype] or master_dtype(dtype)


def shard_parameters(model: Decoder, mesh: DeviceMesh, dtype: str, keep_gathered: bool = False) -> None:
    """Shards embedding, blocks and head one by one over ``mesh``, then the rest; gradients become global sums.

    The sum is never turned into a mean: ranks hold different numbers of valid tokens, and the loss is divided by their
    global count. Sums are forced, because otherwise FSDP2 takes PREMUL_SUM, which Gloo lacks. ``keep_gathered``: blocks
    stay whole from their first forward to the end of the step, for pipeline stages.
    """
    compute = COMPUTE_DTYPES[dtype]
    # Rotations are fp32 whatever the arithmetic, so inputs of blocks are not cast.
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=torch.float32 if compute else None,
        cast_forward_inputs=False,
    )
    blocks = list(model.layers)
    for block in blocks:
        # The backward pass starts with the last block: freeing it in between would gather it twice.
        free = block is not blocks[-1] and not keep_gathered
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=free)
    if not model.config.tie_embeddings:
        # Each is as large as several layers, and neither is needed while layers compute.
        _shard_ends(model, mesh, policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_ends(model: Decoder, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    if model.embedding is not None:
        fully_shard(model.embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The gradient of a lookup needs no table.
        as_fsdp_module(model.embedding).set_unshard_in_backward(False)
    if model.head is not None:
        # The backward pass starts here, right after the forward pass has ended.
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def gathered_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters, or of their gradients, on one rank before FSDP2 shards them."""
    return sum(_tensor_part(p) * p.element_size() for p in model.parameters())


def _tensor_part(parameter: Tensor) -> int:
    """Returns how many elements of a parameter its rank of the tensor-parallel axis holds."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    names = parameter.device_mesh.mesh_dim_names or ()
    split = [
        size
        for name, size, placement in zip(names, parameter.device_mesh.shape, parameter.placements, strict=True)
        if name == "tp" and placement.is_shard()
    ]
    return parameter.numel() // math.prod(split)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a parameter, gradient or state of the optimizer in full on every rank; all ranks call it.

    Shards of FSDP2 lie inside those of the tensor-parallel axis, the last of the mesh, and are gathered first.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    inner = [Replicate()] * (tensor.device_mesh.ndim - 1)
    return tensor.redistribute(placements=[*inner, tensor.placements[-1]]).full_tensor()


def as_fsdp_module(model: nn.Module) -> FSDPModule:
    """Returns the same object under the type that ``shard_parameters`` has given it."""
    return cast("FSDPModule", model)
