"""Times two ways to do the same work in alternation, and bounds what their ratio is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
UPPER = 0.95


@dataclass(frozen=True)
class StepSeconds:
    """Holds the seconds of one step: on the wall, and on the processor by all threads of this process."""

    wall: float
    cpu: float


class Stopwatch:
    """Counts seconds from its making, or from the last ``lap``."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> StepSeconds:
        """Returns what was spent since the last lap, and starts anew."""
        wall, cpu = time.perf_counter(), time.process_time()
        spent = StepSeconds(wall - self._wall, cpu - self._cpu)
        self._wall, self._cpu = wall, cpu
        return spent


@dataclass(frozen=True)
class Ratio:
    """Holds the median of paired ratios, and a bound that it stays below with 95 % (bootstrap of the median)."""

    median: float
    upper: float

    @classmethod
    def of(cls, over: Sequence[float], under: Sequence[float]) -> Ratio:
        """Pairs the steps of two ways."""
        ratios = np.asarray(over) / np.asarray(under)
        drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
        medians = np.median(ratios[drawn], axis=1)
        return cls(float(np.median(ratios)), float(np.quantile(medians, UPPER)))


class Alternation:
    """Interleaves the steps of a loop that cannot be stopped with those of one that can: A B, B A, A B, ...

    The loop calls ``after_step`` when its own step is done, and finds its clock started anew on return. Who goes
    first alternates, for the second of a pair finds warm caches.
    """

    def __init__(self, other: Callable[[int], None]) -> None:
        self._other = other
        self.own: list[StepSeconds] = []
        self.others: list[StepSeconds] = []
        self._watch = Stopwatch()

    def after_step(self) -> None:
        """Notes the loop's own step, and takes the other's when it is its turn."""
        self.own.append(self._watch.lap())
        if len(self.own) % 2:
            self._run_other()
            self._run_other()
        self._watch.lap()

    def _run_other(self) -> None:
        number = len(self.others) + 1
        watch = Stopwatch()
        self._other(number)
        self.others.append(watch.lap())
