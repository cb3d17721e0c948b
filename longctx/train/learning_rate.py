"""Gives the learning rate of every step: warm-up in a straight line, then the schedule that ``optim.schedule`` names.

It is a pure function of the step and of what ``config.yaml`` records, so a run that resumes has the rates of one that
never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longctx.catalog import SCHEDULES
from longctx.config import OptimConfig
from longctx.errors import StorageError
from longctx.train.schedules.schedule import Schedule, Terms


class LearningRate:
    """Counts steps and gives each its rate; its only state is how many are done. ``steps``: of the whole run."""

    def __init__(self, config: OptimConfig, steps: int) -> None:
        config = config.settled(steps)
        self._schedule: Schedule = SCHEDULES.load(config.schedule)
        self._lr = config.lr
        self._terms = terms_of(config, steps)
        self.done = 0

    def rate(self, step: int) -> float:
        """Computes the learning rate of step ``step``, counted from 1."""
        if step <= self._terms.warmup:
            return self._lr * step / self._terms.warmup
        return self._lr * self._schedule.ratio(step, self._terms)

    def advance(self) -> float:
        """Counts the next step and returns its learning rate."""
        self.done += 1
        return self.rate(self.done)

    def state_dict(self) -> dict[str, int]:
        """Returns how many steps are done."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the schedule go on after the steps that a checkpoint counts."""
        done = state.get("done")
        if type(done) is not int or done < 0:
            raise StorageError(f"the schedule in the checkpoint is damaged: done={done!r}, must be a count of steps")
        self.done = done


def terms_of(config: OptimConfig, steps: int) -> Terms:
    """Returns the numbers that the schedule of a settled section computes with."""
    assert config.warmup_steps is not None, "settled() comes first"
    return Terms(config.min_lr_ratio, config.warmup_steps, config.decay_steps or steps, steps)


def told(config: OptimConfig, steps: int) -> str:
    """Says in one line what the rate will do in a run of so many steps."""
    config = config.settled(steps)
    rates, terms = LearningRate(config, steps), terms_of(config, steps)
    parts = [f"warm-up to {config.lr:.3g} at step {terms.warmup}"] if terms.warmup else [f"{config.lr:.3g} from step 1"]
    falls = SCHEDULES.load(config.schedule).falls(terms)
    if falls is None:
        return f"lr: {', '.join([*parts, 'then constant'])}"
    begin, end = falls
    if begin > terms.warmup:
        parts.append(f"constant to step {begin}")
    parts.append(f"{config.schedule} to {rates.rate(end):.3g} at step {end}")
    if end < steps:
        parts.append(f"then constant to step {steps}; optim.decay_steps={steps} would end it there")
    elif end > steps:
        parts.append(f"of which step {steps}, the last, has {rates.rate(steps):.3g}")
    return f"lr: {', '.join(parts)}"
