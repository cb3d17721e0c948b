"""Drives a step with PyTorch alone: FSDP2 and a ``torch.optim`` optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longctx.parallel.data import as_fsdp_module, gathered_bytes
from longctx.sequence import LocalBatch

# How many bytes parameters, and their gradients, may take unsharded to be kept for several micro-batches. Up to it
# parameters are gathered once a step, before the first, and gradients are reduced once, after the last. Above it both
# are done for each micro-batch, which costs traffic instead of memory.
UNSHARDED_BYTES = 2**30


class NativeEngine:
    """Drives a model with FSDP2, one micro-batch after another.

    ``model`` has passed through ``parallelize``; ``optimizer`` holds its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self._once = gathered_bytes(model) <= UNSHARDED_BYTES
        self._shards = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def accumulate(self, batches: Sequence[LocalBatch], scale: float) -> Tensor:
        """Runs the micro-batches one after another; see ``Engine``."""
        total: Tensor | None = None
        once = self._once and len(batches) > 1
        for number, batch in enumerate(batches, start=1):
            self._expect(first=number == 1, last=number == len(batches), once=once)
            loss = self.forward(batch)
            (loss * scale).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None, "a step has at least one micro-batch"
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[LocalBatch]) -> Tensor:
        """Runs forward of one microbatch after another; see ``Engine``."""
        losses = [self.forward(batch) for batch in batches]
        # Without a backward pass nothing else frees what was gathered; a checkpoint must find the shards.
        for shard in self._shards:
            shard.reshard()
        return torch.stack(losses).sum()

    def forward(self, batch: LocalBatch) -> Tensor:
        """Computes this rank's sum of the loss of one microbatch."""
        loss: Tensor = self.model(batch.tokens, batch.positions, batch.plan.handle, batch.labels)
        return loss

    def _expect(self, first: bool, last: bool, once: bool) -> None:
        """Tells FSDP2 which micro-batch comes; each call of its costs, so only what changes is told."""
        if not first and not last:
            return
        as_fsdp_module(self.model).set_is_last_backward(last)
        for shard in self._shards:
            if once and first:
                shard.set_reshard_after_forward(False, recurse=False)
            shard.set_reshard_after_backward(last or not once, recurse=False)
            shard.set_requires_gradient_sync(last or not once, recurse=False)
            # Shards may have to be reduced each time; between replicas they never need to be before the last.
            shard.set_requires_all_reduce(last, recurse=False)

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Returns this rank's share of the gradient's squared norm, fp64 scalar; see ``Engine``."""
        shares = [
            torch.linalg.vector_norm(_local(p.grad), dtype=torch.float64).square() / _copies(p.grad)
            for p in self.counted()
            if p.grad is not None
        ]
        return torch.stack(shares).sum()

    def counted(self) -> Iterable[nn.Parameter]:
        """Lists the parameters of which this rank holds a share, each once."""
        return self.model.parameters()

    @torch.no_grad()
    def update(self, lr: float, coefficient: float) -> None:
        """Scales the gradients by ``coefficient``, takes one optimizer step and drops them."""
        if coefficient != 1.0:
            torch._foreach_mul_([_local(p.grad) for p in self.model.parameters() if p.grad is not None], coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Drops the gradients without an update."""
        self.optimizer.zero_grad(set_to_none=True)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(gradient: Tensor) -> int:
    """Counts the ranks that hold an equal copy of this shard."""
    if not isinstance(gradient, DTensor):
        return 1
    axes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in axes if placement.is_replicate())
