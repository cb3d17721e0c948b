"""Lets the rate fall along half a cosine from the end of warm-up to step ``optim.decay_steps``, and stay there."""

from __future__ import annotations

import math

from longctx.train.schedules.schedule import Schedule, Terms


def ratio(step: int, terms: Terms) -> float:
    """Returns ``floor + (1 - floor) * (1 + cos(pi * progress)) / 2``; beyond the decay's end the floor."""
    progress = min(1.0, (step - terms.warmup) / max(1, terms.decay - terms.warmup))
    return terms.fall(0.5 * (1.0 + math.cos(math.pi * progress)))


SCHEDULE = Schedule(
    "cosine",
    ratio,
    falls=lambda terms: (terms.warmup, terms.decay),
    settle=lambda decay, steps: (decay or steps, decay or steps),
    extends="its end stays where it was recorded, and the rate at its minimum beyond, unless optim.decay_steps is set",
    reads=frozenset({"decay_steps", "min_lr_ratio"}),
)
