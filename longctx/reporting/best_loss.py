"""Remembers the lowest loss of a run, and the last one."""

from __future__ import annotations

import math
from typing import Any

LOSSES = ("loss", "validation_loss")


class BestLoss:
    """Takes the records of a run one after another; numbers that are not finite are passed over."""

    def __init__(self) -> None:
        self.last: dict[str, tuple[int, float]] = {}
        self.best: dict[str, tuple[int, float]] = {}

    def take(self, record: dict[str, Any]) -> None:
        """Looks at the losses of one step."""
        for name in LOSSES:
            value = record.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            self.last[name] = record["step"], value
            if name not in self.best or value < self.best[name][1]:
                self.best[name] = self.last[name]

    def summary(self) -> dict[str, Any]:
        """Returns the lowest losses and their steps by name, such as ``best_loss`` and ``best_loss_step``."""
        found: dict[str, Any] = {}
        for name, (step, value) in self.best.items():
            found |= {f"best_{name}": value, f"best_{name}_step": step}
        return found
