"""Keeps the rate constant and lets it fall in a straight line over the last ``optim.decay_steps`` steps of the run.

Warm-up, stable, decay: MiniCPM (Hu et al., 2024). A run of more steps only moves its decay, so any checkpoint from
before the decay may be gone on from.
"""

from __future__ import annotations

from longctx.train.schedules.schedule import Schedule, Terms


def ratio(step: int, terms: Terms) -> float:
    """Returns 1 until the decay begins; its last step, the run's, has the floor, and so have steps beyond."""
    left = max(0, terms.steps - step)
    return terms.fall(min(1.0, left / terms.decay))


SCHEDULE = Schedule(
    "wsd",
    ratio,
    falls=lambda terms: (terms.steps - terms.decay, terms.steps),
    settle=lambda decay, steps: (decay or max(1, steps // 10), steps),
    extends="the decay moves to the new end; go on from a checkpoint before it, with --step",
    reads=frozenset({"decay_steps", "min_lr_ratio"}),
)
