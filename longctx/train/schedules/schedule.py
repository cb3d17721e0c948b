"""Defines what a schedule of the learning rate declares: a pure function of the step, and how to tell of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Terms:
    """Holds the numbers that a schedule computes with.

    ``floor``: share of the full rate that is left at the end of a decay. ``warmup``: steps until the full rate.
    ``decay``: ``optim.decay_steps``, where the schedule reads it. ``steps``: of the whole run.
    """

    floor: float
    warmup: int
    decay: int
    steps: int

    def fall(self, share: float) -> float:
        """Returns the share of the full rate after ``share`` of the way, 1 to 0, down to the floor."""
        return self.floor + (1.0 - self.floor) * share


@dataclass(frozen=True)
class Schedule:
    """Declares a schedule.

    ``ratio(step, terms)``: share of the full rate in a step after warm-up, steps counted from 1. ``falls(terms)``: the
    last step at the full rate and the step at which the decay has ended, or None when the rate never falls.
    ``settle(decay_steps, steps)``: what ``optim.decay_steps`` stands for, and the steps of which warm-up takes a tenth.
    ``reads``: fields of the section ``optim`` that it reads among those that not every schedule does. ``extends``: how
    a run of more steps goes on.
    """

    name: str
    ratio: Callable[[int, Terms], float]
    falls: Callable[[Terms], tuple[int, int] | None]
    settle: Callable[[int | None, int], tuple[int | None, int]]
    extends: str
    reads: frozenset[str] = frozenset()
