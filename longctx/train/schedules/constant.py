"""Keeps the rate where warm-up has brought it."""

from __future__ import annotations

from longctx.train.schedules.schedule import Schedule

SCHEDULE = Schedule(
    "constant",
    lambda step, terms: 1.0,
    falls=lambda terms: None,
    settle=lambda decay, steps: (None, steps),
    extends="it goes on as it is",
)
