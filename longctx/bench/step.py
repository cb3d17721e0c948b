"""Times a few optimizer steps by the run's own parts, as far as is known without a profiler.

    data              waiting for the batches that a thread reads and plans ahead
    forward_backward  all micro-batches, with what hides behind them and what does not
    optimizer         the update
    agreement         the gradient's norm, and what all ranks must know; so it also holds waiting for slower ranks

These four add up to the step. On CUDA the device is awaited between them, which a run does not do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.bench.timing import Report, Timing, silent
from longctx.comm import ExchangeEvent, group_of
from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.engines import Engine
from longctx.reporting.meter import Meter, Observation
from longctx.sequence import LocalBatch
from longctx.train.step_parts import StepParts

PARTS = ("data", "forward_backward", "optimizer", "agreement")
WAITED = "exchange_wait"  # part of forward_backward


@dataclass(frozen=True)
class StepCost:
    """Tells what a step costs, equal on all ranks; what cannot be known here is None.

    ``seconds``: of a whole step. ``parts``: medians by ``PARTS``, means over ranks; ``parts_by_rank``: each rank's.
    ``exchange_wait``: of forward_backward, what the host waited for attention's exchanges; on CUDA streams wait, not
    the host. ``memory_bytes``: at a step's peak by category, of the rank that has most; ``memory_peak_bytes``: of a
    whole process, or of a device.
    """

    seconds: Timing
    tokens: int
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu_causal: float | None
    mfu_full: float | None
    parts: dict[str, float]
    parts_by_rank: dict[str, list[float]]
    exchange_wait: float | None
    memory_bytes: dict[str, int] | None
    memory_peak_bytes: int | None
    comm_bytes: int
    balance: float
    padding: float
    loss: float | None


def measure(
    config: Config, parts: StepParts, meter: Meter, warm_up: int, steps: int, report: Report = silent
) -> StepCost:
    """Takes ``warm_up`` + ``steps`` steps, and one more that measures memory; all ranks of the world call it."""
    run = _Run(parts, meter, warm_up + steps + (parts.memory is not None), report)
    with run.timed():
        for _ in range(warm_up):
            run.step("warming up")
        taken = [run.step("timing") for _ in range(steps)]
    memory = run.memory_step() if parts.memory is not None else None
    world = dist.get_world_size()
    seconds = Timing.of([one.total for one in taken])
    by_rank = {name: [statistics.median(column) for column in zip(*(one.parts[name] for one in taken), strict=True)]
               for name in (*PARTS, WAITED)}  # fmt: skip
    means = {name: statistics.median(statistics.fmean(one.parts[name]) for one in taken) for name in (*PARTS, WAITED)}
    waited = means.pop(WAITED)
    del by_rank[WAITED]
    last = taken[-1]
    tokens = statistics.fmean(one.seen.tokens for one in taken)
    cells, full = (statistics.fmean(getattr(one.seen, name) for one in taken) for name in ("cells", "full_cells"))

    def utilization(pairs: float) -> float | None:
        return meter.utilization(config, round(tokens), round(pairs), seconds.median)

    return StepCost(
        seconds=seconds,
        tokens=round(tokens),
        tokens_per_second=tokens / seconds.median,
        tokens_per_second_per_device=tokens / seconds.median / world,
        mfu_causal=utilization(cells),
        mfu_full=utilization(full),
        parts=means,
        parts_by_rank=by_rank,
        exchange_wait=waited if meter.device.type == "cpu" else None,
        memory_bytes=memory,
        memory_peak_bytes=last.seen.memory_peak_bytes,
        comm_bytes=last.seen.comm_bytes,
        balance=statistics.fmean(one.seen.balance for one in taken),
        padding=statistics.fmean(one.seen.padding for one in taken),
        loss=last.loss,
    )


@dataclass(frozen=True)
class _Taken:
    """What one step took. ``total``: the slowest rank's; ``parts``: of each rank."""

    total: float
    parts: dict[str, list[float]]
    seen: Observation
    loss: float | None


class _Run:
    """Takes steps one after another, as the trainer takes them."""

    def __init__(self, parts: StepParts, meter: Meter, total: int, report: Report) -> None:
        self._parts, self._meter, self._total, self._report = parts, meter, total, report
        self._engine = TimedEngine(parts.step.engine, meter.device)
        self._traffic = group_of(meter.mesh.sequence_group).traffic
        self._done = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times the engine's parts and attention's waits meanwhile."""
        engine, timeline = self._parts.step.engine, self._traffic.timeline
        self._parts.step.engine, self._traffic.timeline = self._engine, []
        try:
            yield
        finally:
            self._parts.step.engine, self._traffic.timeline = engine, timeline

    def step(self, doing: str) -> _Taken:
        """Takes one step; returns what it cost every rank."""
        self._report(self._done, self._total, doing)
        self._engine.seconds = dict.fromkeys(self._engine.seconds, 0.0)
        timeline: list[ExchangeEvent] = []
        self._traffic.timeline = timeline
        started = time.perf_counter()
        batches = self._parts.prefetcher.take(more=self._done + 1 < self._total)
        data = time.perf_counter() - started
        result = self._parts.step(batches, self._parts.state.scheduler.advance(), self._done + 1)
        seen = self._meter.observe(batches)
        total = time.perf_counter() - started
        self._done += 1
        waited = sum(event.ended - event.started for event in timeline if not event.posted)
        computing, update = self._engine.seconds["accumulate"], self._engine.seconds["update"]
        own = [data, computing, update, total - data - computing - update, waited, total]
        rows = gather_numbers(own, self._meter.mesh.world_group, self._meter.device)
        *columns, totals = map(list, zip(*rows, strict=True))
        return _Taken(max(totals), dict(zip((*PARTS, WAITED), columns, strict=True)), seen, result.loss)

    def memory_step(self) -> dict[str, int]:
        """Takes one step; returns bytes by category at its peak, of the rank whose peak is highest."""
        memory = self._parts.memory
        assert memory is not None, "a run that measures it"
        self._report(self._done, self._total, "measuring memory")
        batches = self._parts.prefetcher.take(more=False)
        with memory.measured(self._parts.step) as found:
            self._parts.step(batches, self._parts.state.scheduler.advance(), self._done + 1)
        rows = gather_numbers(list(found.values()), self._meter.mesh.world_group, self._meter.device)
        by_rank = [dict(zip(found, map(int, row), strict=True)) for row in rows]
        return max(by_rank, key=lambda one: one["peak"])


@dataclass
class TimedEngine:
    """Wraps an engine and keeps how long its parts take, the device awaited."""

    engine: Engine
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"accumulate": 0.0, "update": 0.0})

    def accumulate(self, batches: Sequence[LocalBatch], scale: float) -> Tensor:
        """Times the engine's forward and backward."""
        loss: Tensor = self._timed("accumulate", lambda: self.engine.accumulate(batches, scale))
        return loss

    def evaluate(self, batches: Sequence[LocalBatch]) -> Tensor:
        """Returns the engine's loss; not timed."""
        return self.engine.evaluate(batches)

    def squared_norm(self) -> Tensor:
        """Returns the engine's norm; not timed."""
        return self.engine.squared_norm()

    def update(self, lr: float, coefficient: float) -> None:
        """Times the engine's update."""
        self._timed("update", lambda: self.engine.update(lr, coefficient))

    def discard(self) -> None:
        """Drops the gradients; not timed."""
        self.engine.discard()

    def _timed(self, part: str, run: Callable[[], Any]) -> Any:
        self._await()
        started = time.perf_counter()
        result = run()
        self._await()
        self.seconds[part] += time.perf_counter() - started
        return result

    def _await(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
