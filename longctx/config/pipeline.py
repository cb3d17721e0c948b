"""Defines what each pipeline schedule asks of stages and microbatches; a microbatch is a micro-batch of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longctx.errors import ConfigError
from longctx.rules import one_of


@dataclass(frozen=True)
class ScheduleRules:
    """Says what one pipeline schedule takes.

    ``virtual``: stages per rank when none are asked for; ``most``: and at most. ``split_backward``: runs the gradients
    of inputs and of weights apart, over one graph. ``fits``: a test of (ranks of the pipeline, microbatches of a step).
    ``needs`` says the same in words.
    """

    virtual: int
    most: int | None
    split_backward: bool
    fits: Callable[[int, int], bool]
    needs: str


RULES = {
    "gpipe": ScheduleRules(1, 1, False, lambda pp, count: count >= 1, "at least 1"),
    "1f1b": ScheduleRules(1, 1, False, lambda pp, count: count >= pp, "at least parallel.pp"),
    "interleaved_1f1b": ScheduleRules(
        2,
        None,
        False,
        lambda pp, count: count >= pp and count % (count // pp) == 0,
        "at least parallel.pp in rounds of one size",
    ),
    "zbv": ScheduleRules(2, 2, True, lambda pp, count: count >= 1, "at least 1"),
    "dualpipev": ScheduleRules(2, 2, True, lambda pp, count: count >= 2 * pp, "at least 2 × parallel.pp"),
}


def virtual_stages(schedule: str, wish: int | None) -> int:
    """Returns the stages per rank; None takes what the schedule needs. Raises ``ConfigError``."""
    one_of("parallel.pp_schedule", schedule, tuple(RULES))
    rules = RULES[schedule]
    if wish is None:
        return rules.virtual
    if wish < rules.virtual or (rules.most is not None and wish > rules.most):
        least = "at least " if rules.most is None else ""
        raise ConfigError(
            f"parallel.pp_virtual={wish}: parallel.pp_schedule={schedule} has {least}{rules.virtual} "
            f"stage{'s' if rules.virtual > 1 else ''} per rank; nearest valid value: {rules.virtual}, or null"
        )
    return wish


def nearest_microbatches(schedule: str, pp: int, wanted: int) -> int:
    """Returns the count next to ``wanted`` that the schedule takes on ``pp`` ranks, the larger of two equally near."""
    fits = RULES[schedule].fits
    return next(
        count
        for distance in range(wanted + 2 * pp + 1)
        for count in (wanted + distance, wanted - distance)
        if count >= 1 and fits(pp, count)
    )
