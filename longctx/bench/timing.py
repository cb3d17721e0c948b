"""Times passes of several entrants in turn: the slowest rank's seconds, on CUDA events where the device is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

Pass = Callable[[], object]
Report = Callable[[int, int, str], None]  # how many are done, of how many, and what is under way

CPU = torch.device("cpu")
SLOW = 3.0  # times the quickest first pass, and
SLOW_SECONDS = 2.0  # whoever takes longer than both is timed in the first round only


@dataclass(frozen=True)
class Timing:
    """Holds the seconds of one pass over all repeats: the slowest rank's, which is when the step is done."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Takes the median and the range of the seconds of several repeats."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def spread(timing: Mapping[str, float], scale: float, form: str) -> str:
    """Writes a median and, of several timings, their range: 901 (859-959).

    ``timing``: the fields of a ``Timing``. ``scale``: a factor for its numbers.
    """
    low, median, high = (format(timing[name] * scale, form) for name in ("low", "median", "high"))
    return f"{median} ({low}-{high})" if timing["repeats"] > 1 else f"{median} (once)"


@dataclass(kw_only=True)
class Entrant:
    """Is timed beside others, and beside the floor of its time, where it has one.

    ``name`` is shown while its turn is on. ``first``: seconds of its first pass, on this rank.
    """

    name: str
    run: Pass
    floor: Pass | None = None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)

    @property
    def shares(self) -> list[float]:
        """Returns floor over time of each repeat; 1.0 is the limit."""
        return [floor / own for floor, own in zip(self.floor_seconds, self.seconds, strict=True)]


def silent(done: int, total: int, what: str) -> None:
    """Reports to nobody."""


def time_in_turn(entrants: Sequence[Entrant], repeats: int, device: torch.device, report: Report = silent) -> None:
    """Times all entrants in turn, round after round; the order reverses each time, for the second finds warm caches.

    Whoever is slow takes part in the first round only, or the slowest would take most of the time. All ranks of the
    world call it together.
    """
    first = torch.tensor([entrant.first for entrant in entrants], device=device)
    dist.all_reduce(first, dist.ReduceOp.MAX)
    slow = (first > max(SLOW * float(first.min()), SLOW_SECONDS)).tolist()
    for entrant, excused in zip(entrants, slow, strict=True):
        if entrant.floor and not excused:
            entrant.floor()
    rounds = [
        [entrant for entrant, excused in zip(entrants, slow, strict=True) if not (excused and repeat)]
        for repeat in range(repeats)
    ]
    done, total = 0, sum(map(len, rounds))
    for repeat, turns in enumerate(rounds):
        for entrant in turns[:: 1 if repeat % 2 else -1]:
            report(done, total, f"{entrant.name}, repeat {repeat + 1} of {repeats}")
            for run in _turn(entrant, repeat):
                seconds = entrant.floor_seconds if run is entrant.floor else entrant.seconds
                seconds.append(slowest(run, device))
            done += 1


def _turn(entrant: Entrant, repeat: int) -> list[Pass]:
    passes: list[Pass] = [entrant.run] if entrant.floor is None else [entrant.run, entrant.floor]
    return passes[:: 1 if repeat % 2 else -1]


def slowest(run: Pass, device: torch.device = CPU) -> float:
    """Returns the seconds from a common start until the last rank of the world is done."""
    dist.barrier()
    taken = torch.tensor(seconds_of(run, device), dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def seconds_of(run: Pass, device: torch.device) -> float:
    """Returns the seconds of a pass on this rank, by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3
