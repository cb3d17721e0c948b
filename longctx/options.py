"""Defines what a user may choose of a strategy of softmax attention.

A new option is one field here, with its valid values, and whoever reads it: a strategy that names the field among its
``options``. The configuration's section ``attention`` inherits these fields, so that each is a key. Strategies that do
not name it refuse it; the operators of all strategies carry it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from longctx.rules import as_word, at_least, one_of, whole


def word(default: str, *others: str) -> Any:
    """Makes a field that holds one of some words; ``default`` leaves the choice to the strategy."""
    return field(default=default, metadata={"words": (default, *others)})


def count() -> Any:
    """Makes a field that holds a number of at least 1, or None, which leaves the choice to the strategy."""
    return field(default=None, metadata={"words": ()})


@dataclass(frozen=True)
class StrategyOptions:
    """Holds what strategies let users choose; the defaults suit every strategy.

    ``grad_dtype``: how gradients that travel are summed. ``fp32``: on their way (float64 for float64 inputs).
    ``compute``: each rank's share goes straight to its owner in the compute dtype.

    ``backward_rotates``: what goes round in burst's backward pass: ``kv`` (keys, values and their gradients), ``q``
    (queries and theirs), or ``auto``, whichever moves fewer bytes. ``ulysses_degree``: ranks among which USP swaps
    tokens for heads; the ring goes across such rows. ``inner_ring``: ranks of burst's inner ring. None: as many as the
    strategy finds best.
    """

    grad_dtype: str = word("fp32", "compute")  # of travelling gradients: summed on the way, or compute: sent straight
    backward_rotates: str = word("auto", "kv", "q")  # what goes round in burst's backward pass; auto: the smaller
    ulysses_degree: int | None = count()  # ranks of usp that swap tokens for heads; null: as many as share the heads
    inner_ring: int | None = count()  # ranks of burst's inner ring; null: all, one ring

    def check(self) -> None:
        """Refuses values that no strategy has. Raises ``ConfigError``."""
        for one in fields(StrategyOptions):
            value, words = getattr(self, one.name), one.metadata["words"]
            if words:
                one_of(f"attention.{one.name}", value, words)
            elif value is not None:
                whole(f"attention.{one.name}", value)
                at_least(f"attention.{one.name}", value, 1, "null")

    def chosen(self) -> dict[str, str]:
        """Returns the options that differ from their defaults, as words."""
        return {
            one.name: as_word(getattr(self, one.name))
            for one in fields(StrategyOptions)
            if getattr(self, one.name) != one.default
        }


DEFAULT = StrategyOptions()
OPTIONS = {one.name: one.default for one in fields(StrategyOptions)}
