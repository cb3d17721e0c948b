"""The engine that is PyTorch alone: FSDP2 and a ``torch.optim`` optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longctx.parallel.data import as_sharded, gathered_bytes
from longctx.sequence import LocalBatch

# With several micro-batches, gradients are reduced once, after the last, where all of them fit unsharded in
# this many bytes; above it they are reduced after each, which costs traffic instead of memory.
UNSHARDED_GRADIENT_BYTES = 2**30


class NativeEngine:
    """``model`` has passed through ``parallelize``; ``optimizer`` holds its parameters."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self._reduce_once = gathered_bytes(model) <= UNSHARDED_GRADIENT_BYTES

    def accumulate(self, batches: Sequence[LocalBatch], scale: float) -> Tensor:
        total: Tensor | None = None
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            as_sharded(self.model).set_is_last_backward(last)
            as_sharded(self.model).set_requires_gradient_sync(last or not self._reduce_once)
            # Shards may have to be reduced each time; between replicas they never need to be before the last.
            as_sharded(self.model).set_requires_all_reduce(last)
            loss = self.model(batch.tokens, batch.positions, batch.plan.handle, batch.labels)
            (loss * scale).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None, "a step has at least one micro-batch"
        return total

    def squared_norm(self) -> Tensor:
        shares = [
            torch.linalg.vector_norm(_local(p.grad), dtype=torch.float64).square() / _copies(p.grad)
            for p in self.counted()
            if p.grad is not None
        ]
        return torch.stack(shares).sum()

    def counted(self) -> Iterable[nn.Parameter]:
        """Parameters of which this rank holds a share, each once."""
        return self.model.parameters()

    def update(self, lr: float, coefficient: float) -> None:
        if coefficient != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    _local(parameter.grad).mul_(coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(gradient: Tensor) -> int:
    """On how many ranks this shard lies, equal."""
    if not isinstance(gradient, DTensor):
        return 1
    axes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in axes if placement.is_replicate())
