"""What ranks of a sequence group tell each other beside attention: that they have one batch, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.errors import ConfigError, DataError
from longctx.integrations.transformers.packing import PackedRows

BUCKET = 64 * 2**20  # bytes that are summed in one message
FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)  # odd, with bits all over
REFUSED = -1  # in place of a batch's numbers, which begin with its rows


def on_all_ranks(group: dist.ProcessGroup | None, input_ids: Tensor, pack: Callable[[], PackedRows]) -> PackedRows:
    """Returns what ``pack`` makes of ``input_ids``, the same batch on all ranks of a group, before any other work.

    Raises ``DataError`` for batches that differ. Where ``pack`` raises on one rank all raise: they would wait for it.
    """
    if group is None or dist.get_world_size(group) == 1:
        return pack()
    refused: Exception | None = None
    numbers = [REFUSED] * 6
    try:
        packed = pack()
        bounds = torch.from_numpy(np.concatenate([row.cu_seqlens for row in packed.documents]))
        others = [torch.from_numpy(packed.labels), torch.from_numpy(packed.positions), bounds]
        numbers = [*input_ids.shape, *map(_digest, [input_ids, *others])]
    except Exception as error:
        refused = error
    own = torch.tensor([numbers], dtype=torch.int64, device=device_of(group))
    everyone = own.new_empty(dist.get_world_size(group), len(numbers))
    dist.all_gather_single(everyone, own, group=group)
    if refused is not None:
        raise refused
    ranks = everyone.tolist()
    for rank, other in enumerate(ranks):
        if other[0] == REFUSED:
            raise DataError(f"rank {rank} of the sequence group refuses the batch that it was given, and says why")
    for rank, other in enumerate(ranks):
        if other != ranks[0]:
            raise DataError(
                f"rank {rank} of the sequence group was given another batch than rank 0; all must cut the same "
                "whole batch: give their samplers one seed, and the number of the group as rank"
            )
    return packed


def _digest(values: Tensor) -> int:
    """A number that other values, or another order of them, hardly have."""
    flat = values.detach().flatten().to(torch.int64)
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    first, second, third = (factor - 2**64 if factor >= 2**63 else factor for factor in FACTORS)
    mixed = (flat + place * first) * second
    return int(((mixed ^ (mixed >> 29)) * third).sum())


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Returns where this rank's messages to a group are."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the sum of a number over the ranks of a group; it may be written over."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Sums gradients over a group, in fp32 where they are of fewer bits."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one in gradients:
        if type(one) is not Tensor:
            raise ConfigError(
                f"a gradient is a {type(one).__name__}, which FSDP reduces itself; "
                "use sequence.loss(..., averaged_over=...) in place of sum_gradients"
            )
    if group is None:
        return
    for bucket in _buckets(gradients):
        dtype = torch.float64 if bucket[0].dtype is torch.float64 else torch.float32
        flat = torch.cat([one.flatten().to(dtype) for one in bucket])
        dist.all_reduce(flat, group=group)
        for one, total in zip(bucket, flat.split([one.numel() for one in bucket])):
            one.copy_(total.view_as(one))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device side by side, up to the size of a message."""
    bucket: list[Tensor] = []
    size = 0
    for one in gradients:
        alike = bucket and (one.dtype, one.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + one.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += one.nbytes
    if bucket:
        yield bucket
