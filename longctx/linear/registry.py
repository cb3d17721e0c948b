"""Defines what a strategy of linear layers declares: how states come and go, and what it executes exactly.

Each strategy's file ends with its declaration; ``longctx.catalog`` maps its name to it. The configuration, the library
and ``longctx verify`` refuse by it before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longctx.attention.costs.estimate import Volume
from longctx.catalog import LAYOUTS, LINEAR_STRATEGIES
from longctx.errors import ConfigError
from longctx.linear.mixer import get_mixer
from longctx.linear.states import Arriving, LinearContext, Summary
from longctx.rules import whole
from longctx.sequence import SequencePlan


@dataclass(frozen=True)
class LinearCase:
    """States what is asked of a strategy: sequence group's size, heads of one rank, mixer, layout, tokens a chunk."""

    world: int
    heads: int
    mixer: str
    layout: str
    layout_block: int = 1
    chunk: int = 64
    causal: bool = True


@dataclass(frozen=True)
class LinearSizes:
    """Counts the bytes that a layer's states take in messages.

    ``transition``: numbers a head of a segment's transition that ranks must tell each other (0, 1, K or K^2). ``wide``:
    bytes of an accumulator.
    """

    batch: int
    heads: int
    keys: int
    values: int
    transition: int
    wide: int

    @property
    def state(self) -> int:
        """Returns the bytes of one segment's states."""
        return self.batch * self.heads * self.keys * self.values * self.wide

    @property
    def summary(self) -> int:
        """Returns the bytes of one segment's states and transitions."""
        return self.state + self.batch * self.heads * self.transition * self.wide


@dataclass(frozen=True)
class LinearStrategy:
    """Declares a strategy of linear layers.

    ``enter`` starts what brings the states that enter a rank's segments, ``leave`` the gradients of those that leave
    them. ``layout``: what it prefers. ``refuses``: why it does not execute a case exactly. ``volume(plan, rank,
    sizes)``: its estimate of what a rank sends; nothing that runs needs one.
    """

    name: str
    enter: Callable[[Summary, LinearContext], Arriving]
    leave: Callable[[Summary, LinearContext], Arriving]
    layout: str
    refuses: Callable[[LinearCase], str | None]
    volume: Callable[[SequencePlan, int, LinearSizes], Volume] | None = None


def get_linear(name: str) -> LinearStrategy:
    """Returns the strategy of that name. Raises ``ConfigError`` with the nearest valid one."""
    found: LinearStrategy = LINEAR_STRATEGIES.load(name)
    return found


def refusal(strategy: LinearStrategy, case: LinearCase) -> str | None:
    """Returns why the strategy does not execute this case exactly; None if it does."""
    for what in ("world", "heads", "layout_block"):
        whole(what, getattr(case, what), 1)
    whole("chunk", case.chunk)
    if case.chunk < 1:
        return f"attention.chunk={case.chunk} must be at least 1 token; 64 is the default"
    if case.layout not in (*LAYOUTS, "explicit"):
        return f"layout {case.layout!r} is unknown; valid layouts: {', '.join(LAYOUTS)}"
    mixer = get_mixer(case.mixer)
    if not mixer.has_states:
        return _refused_without_states(strategy, case)
    if case.layout == "striped" and case.world > 1 and case.layout_block < case.chunk:
        return (
            f"attention.layout_block={case.layout_block} of the striped layout is smaller than "
            f"attention.chunk={case.chunk}: a state would travel for every block; nearest valid: "
            f"attention.layout_block={case.chunk}"
        )
    return strategy.refuses(case)


def _refused_without_states(strategy: LinearStrategy, case: LinearCase) -> str | None:
    """Refuses what a mixer that fetches tokens itself does not read: neither strategy nor chunk."""
    default = next(iter(LINEAR_STRATEGIES))
    if strategy.name != default:
        return (
            f"model.mixer={case.mixer} fetches tokens and has no states that a strategy could move; nearest valid: "
            f"{default}, which stands for none"
        )
    if case.chunk != LinearCase.chunk:
        return (
            f"attention.chunk={case.chunk}: model.mixer={case.mixer} computes by blocks of its own; nearest valid: "
            f"attention.chunk={LinearCase.chunk}, the default"
        )
    if not case.causal:
        return f"model.mixer={case.mixer} is causal by its definition; nearest valid: mixer=basic"
    return None


def causal_only(case: LinearCase) -> str | None:
    """Refuses queries that see later tokens, for strategies without a non-causal form."""
    if not case.causal:
        return "queries must not see later tokens here; attention.linear=lasp2 has a non-causal form"
    return None


def require_linear(strategy: LinearStrategy, case: LinearCase) -> None:
    """Refuses a case that the strategy does not execute exactly. Raises ``ConfigError``."""
    reason = refusal(strategy, case)
    if reason:
        raise ConfigError(f"attention.linear={strategy.name} refuses: {reason}")
