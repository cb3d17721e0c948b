"""What strategies exist, and what each of them executes exactly.

A strategy declares its limits here and nowhere else; the configuration, the library and ``longctx verify``
refuse by this declaration before any work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from longctx.attention.operator import Operator
from longctx.errors import ConfigError
from longctx.sequence import LAYOUTS, Mask, SequencePlan


@dataclass(frozen=True)
class AttentionCase:
    """What is asked of a strategy: the sequence group's size, head counts of one rank, layout and mask."""

    world: int
    heads: int
    kv_heads: int
    layout: str
    mask: Mask


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in one layer."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Strategy:
    """A registered strategy. ``volume(plan, rank, row_bytes, gradient_row_bytes)`` is its closed form: the
    bytes of one token's keys (or values) over batch and heads as they travel, and of its dk (or dv).
    """

    name: str
    operator: Operator
    layout: str  # what it prefers
    refuses: Callable[[AttentionCase], str | None]
    volume: Callable[[SequencePlan, int, int, int], Volume]


# Name of the strategy -> module that registers it; each module holds `STRATEGIES`.
MODULES = {
    "local": "longctx.attention.local",
    "ring": "longctx.attention.ring",
    "striped": "longctx.attention.ring",
}


def get_strategy(name: str) -> Strategy:
    if name not in MODULES:
        raise ConfigError(f"attention.strategy {name!r} is unknown; valid strategies: {', '.join(MODULES)}")
    strategies: dict[str, Strategy] = importlib.import_module(MODULES[name]).STRATEGIES
    return strategies[name]


def refusal(strategy: Strategy, case: AttentionCase) -> str | None:
    """Why the strategy does not execute this case exactly; None if it does."""
    if case.heads % case.kv_heads:
        nearest = max(n for n in range(1, case.kv_heads + 1) if case.heads % n == 0)
        return (
            f"{case.heads} query heads do not divide over {case.kv_heads} key/value heads; "
            f"nearest valid: kv_heads={nearest}"
        )
    if case.layout not in (*LAYOUTS, "explicit"):
        return f"layout {case.layout!r} is unknown; valid layouts: {', '.join(LAYOUTS)}"
    return strategy.refuses(case)


def require(strategy: Strategy, case: AttentionCase) -> None:
    reason = refusal(strategy, case)
    if reason:
        raise ConfigError(f"attention.strategy={strategy.name} refuses: {reason}")
