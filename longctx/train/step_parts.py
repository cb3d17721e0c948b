"""Collects everything that takes an optimizer step, apart from what a trainer does around it."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.checkpoint.checkpointer import TrainState
from longctx.reporting.memory import StepMemory
from longctx.train.prefetcher import Prefetcher
from longctx.train.step import TrainStep


@dataclass(frozen=True)
class StepParts:
    """Holds the parts that take an optimizer step.

    ``state``: model, optimizer, schedule and loader. ``memory``: None for a run that does not measure it.
    """

    state: TrainState
    step: TrainStep
    prefetcher: Prefetcher
    memory: StepMemory | None
