"""Attention forward and backward under each layout, against the floor of its own rank-local work.

The floor computes the same tiles with the same kernel on all ranks at once, on key/value blocks that are
already there: nothing is exchanged, nothing is packed. A strategy's share of its floor says what its
communication and bookkeeping cost, whatever the machine's speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.contract import kernel_for
from longctx.attention.partial import Partial
from longctx.sequence import SequencePlan
from longctx.verify import VerifyCase
from longctx.verify.run import attention_of, cut


@dataclass(frozen=True)
class Timing:
    """Seconds of one pass over all repeats: the slowest rank's, which is when the step is done."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Measured:
    """One case: the strategy's time, its floor's, and their ratio within each repeat."""

    strategy: Timing
    floor: Timing
    share_of_floor: Timing  # floor / strategy, paired by repeat; 1.0 is the limit


def measure(cases: list[VerifyCase], repeats: int) -> list[Measured]:
    """Times all cases interleaved, so that a slow minute of the machine hits all of them alike."""
    passes = [(_strategy_pass(case), _floor_pass(case)) for case in cases]
    seconds: list[list[tuple[float, float]]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for number, (strategy, floor) in enumerate(passes):
            # Who goes first alternates: the second finds warm caches.
            order = (strategy, floor) if repeat % 2 else (floor, strategy)
            taken = {run: slowest(run) for run in order}
            if repeat:  # the first round warms up
                seconds[number].append((taken[strategy], taken[floor]))
    return [
        Measured(
            Timing.of([strategy for strategy, _ in pairs]),
            Timing.of([floor for _, floor in pairs]),
            Timing.of([floor / strategy for strategy, floor in pairs]),
        )
        for pairs in seconds
    ]


def slowest(run: Callable[[], object]) -> float:
    """Seconds from a common start until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def local_inputs(case: VerifyCase) -> tuple[SequencePlan, list[Tensor]]:
    """The case's plan, and this rank's q, k, v and dout."""
    plan, rank = case.plan(), dist.get_rank()
    return plan, [cut(whole, plan, rank) for whole in case.inputs()]


def _strategy_pass(case: VerifyCase) -> Callable[[], object]:
    plan, (q, k, v, dout) = local_inputs(case)
    attention = attention_of(case, dist.group.WORLD)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(attention(q, k, v, plan.handle), (q, k, v), dout)


def _floor_pass(case: VerifyCase) -> Callable[[], object]:
    """The rank's tiles of every key shard, on blocks that lie in memory beforehand."""
    plan, (q, _, _, dout) = local_inputs(case)
    rank, (_, k, v, _) = dist.get_rank(), case.inputs()
    shards = [(cut(k, plan, owner), cut(v, plan, owner)) for owner in range(case.world)]
    tiles = [plan.tiles(rank, owner) for owner in range(case.world)]
    kernel, scale = kernel_for(case.kernel, q, k), q.shape[-1] ** -0.5

    def run() -> None:
        partial = Partial(q)
        for (keys, values), owed in zip(shards, tiles, strict=True):
            kernel.forward(q, keys, values, owed, scale, partial)
        out = partial.out.to(q.dtype)
        dq = torch.zeros_like(partial.out)
        for (keys, values), owed in zip(shards, tiles, strict=True):
            grads = (torch.zeros_like(keys, dtype=dq.dtype), torch.zeros_like(values, dtype=dq.dtype))
            kernel.backward(dout, q, keys, values, out, partial.lse, owed, scale, (dq, *grads))

    return run
