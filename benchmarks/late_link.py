"""Measures exposed waiting over links that are late: what ranks waited for exchanges, beside what a replay predicts.

A rank keeps a timeline of a pass: when it posted which exchange, and when it awaited it. Its waits are what was
exposed; what lies between them is computing. The replay takes posts and computing from the timelines and the latency
from the command, and tells how long waits should have been.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.link import PASSES
from benchmarks.waiting import program_of, replay, wait_seconds
from longctx.bench.timing import Report, Timing, silent
from longctx.comm import ExchangeEvent, group_of
from longctx.verify import VerifyCase
from longctx.verify.run import core_of, local_inputs

HEAD_START = 0.05  # seconds from an agreement to the start that was agreed: longer than it takes to hear of it
CLOSE = 0.2  # how far a measured ratio may be from the predicted one


@dataclass(frozen=True)
class PassTimeline:
    """Tells when one rank began and ended a pass, in seconds of this machine's clock, which all ranks share."""

    started: float
    ended: float
    timeline: tuple[ExchangeEvent, ...]


@dataclass(frozen=True)
class Exposed:
    """Tells how long the rank that waits longest waits, in seconds by repeat: measured, and by replay."""

    measured: tuple[float, ...]
    predicted: tuple[float, ...]

    def __add__(self, other: Exposed) -> Exposed:
        """Adds the waits of two passes, one after the other."""
        return Exposed(
            tuple(a + b for a, b in zip(self.measured, other.measured, strict=True)),
            tuple(a + b for a, b in zip(self.predicted, other.predicted, strict=True)),
        )


@dataclass(frozen=True)
class ExposedRatio:
    """Compares exposed waiting of another strategy with LASP-2's, paired by repeat."""

    measured: Timing
    predicted: Timing

    @classmethod
    def of(cls, over: Exposed, under: Exposed) -> ExposedRatio:
        """Pairs the waits of two strategies by repeat."""
        return cls(_paired(over.measured, under.measured), _paired(over.predicted, under.predicted))

    @property
    def deviation(self) -> float:
        """Returns how far the measured ratio is from the predicted one."""
        return self.measured.median / self.predicted.median - 1

    @property
    def close(self) -> bool:
        """Tells whether the measured ratio is near enough to the predicted one."""
        return abs(self.deviation) <= CLOSE


def _paired(over: Sequence[float], under: Sequence[float]) -> Timing:
    return Timing.of([a / max(b, 1e-9) for a, b in zip(over, under, strict=True)])


def measure(cases: list[VerifyCase], repeats: int, report: Report = silent) -> list[list[list[PassTimeline]]]:
    """Measures, by case and repeat, the forward and the backward pass of this rank.

    Cases are interleaved, in an order that reverses each time.
    """
    found: list[list[list[PassTimeline]]] = [[] for _ in cases]
    passes = [_Passes(case) for case in cases]
    for repeat in range(repeats + 1):
        report(repeat, repeats + 1, "all routes in turn")
        for number in range(len(cases))[:: 1 if repeat % 2 else -1]:
            seen = [_timed_pass(run) for run in (passes[number].forward, passes[number].backward)]
            if repeat:  # the first round opens connections and warms up
                found[number].append(seen)
    return found


class _Passes:
    """Runs both passes of one case on this rank."""

    def __init__(self, case: VerifyCase) -> None:
        self._plan, self._local, self._dout = local_inputs(case, dist.get_rank())
        self._compute = core_of(case, dist.group.WORLD)
        self._out: Tensor = self._dout

    def forward(self) -> None:
        self._out = self._compute(self._local, self._plan.handle)

    def backward(self) -> None:
        torch.autograd.grad(self._out, list(self._local.values()), self._dout)


def _timed_pass(run: Callable[[], None]) -> PassTimeline:
    traffic = group_of(dist.group.WORLD).traffic
    timeline: list[ExchangeEvent] = []
    traffic.timeline = timeline
    started = _together()
    run()
    ended = time.perf_counter()
    traffic.timeline = None
    return PassTimeline(started, ended, tuple(timeline))


def _together() -> float:
    """Waits for a moment that all ranks agree on: they would leave a barrier over late links one after the other."""
    start = torch.tensor(time.perf_counter() + HEAD_START, dtype=torch.float64)
    dist.all_reduce(start, dist.ReduceOp.MAX)
    time.sleep(max(0.0, float(start) - time.perf_counter()))
    return float(start)


def judged(ranks: Sequence[Sequence[Sequence[PassTimeline]]], latency: float) -> dict[str, Exposed]:
    """Compares by pass what every rank saw of one case with its replay.

    ``ranks[rank][repeat][pass]``; ``latency`` in seconds.
    """
    found = {}
    for number, name in enumerate(PASSES):
        repeats = [[repeat[number] for repeat in seen] for seen in zip(*ranks, strict=True)]
        measured = [max(wait_seconds(rank.timeline) for rank in repeat) for repeat in repeats]
        predicted = [
            max(
                spent.waited
                for spent in replay([program_of(rank.timeline, rank.started, rank.ended) for rank in repeat], latency)
            )
            for repeat in repeats
        ]
        found[name] = Exposed(tuple(measured), tuple(predicted))
    return found


def in_order(exposed: Sequence[Exposed]) -> bool:
    """Tells whether the first one's waiting is the least in the median."""
    medians = [Timing.of(one.measured).median for one in exposed]
    return all(medians[0] < other for other in itertools.islice(medians, 1, None))
