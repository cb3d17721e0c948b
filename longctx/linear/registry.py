"""What strategies linear layers have, and what each of them executes exactly.

A strategy declares its limits here and nowhere else; the configuration, the library and ``longctx verify`` refuse by
this declaration before any work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from longctx.attention.runtime.registry import Volume
from longctx.errors import ConfigError
from longctx.linear.mixer import FETCHES, get_mixer
from longctx.linear.states import Arriving, LinearContext, Summary
from longctx.sequence import LAYOUTS, SequencePlan


@dataclass(frozen=True)
class LinearCase:
    """What is asked of a strategy: the sequence group's size, heads of one rank, the mixer, layout, tokens a chunk."""

    world: int
    heads: int
    mixer: str
    layout: str
    layout_block: int = 1
    chunk: int = 64
    causal: bool = True


@dataclass(frozen=True)
class LinearSizes:
    """What a layer's states weigh on their way. ``transition``: numbers a head of a segment's transition that ranks
    must tell each other (0, 1, K or K^2). ``wide``: bytes of an accumulator."""

    batch: int
    heads: int
    keys: int
    values: int
    transition: int
    wide: int

    @property
    def state(self) -> int:
        """Bytes of one segment's states."""
        return self.batch * self.heads * self.keys * self.values * self.wide

    @property
    def summary(self) -> int:
        """Bytes of one segment's states and transitions."""
        return self.state + self.batch * self.heads * self.transition * self.wide


@dataclass(frozen=True)
class LinearStrategy:
    """A registered strategy. ``volume(plan, rank, sizes)`` is its closed form.

    ``enter`` starts what brings the states that enter a rank's segments, ``leave`` the gradients of those that leave
    them. ``layout``: what it prefers.
    """

    name: str
    enter: Callable[[Summary, LinearContext], Arriving]
    leave: Callable[[Summary, LinearContext], Arriving]
    layout: str
    refuses: Callable[[LinearCase], str | None]
    volume: Callable[[SequencePlan, int, LinearSizes], Volume]


DEFAULT = "lasp2"

# Name of the strategy -> module that registers it; each module holds `STRATEGIES`.
MODULES = {
    "lasp2": "longctx.linear.strategies.lasp2",
    "lasp": "longctx.linear.strategies.lasp",
    "headwise": "longctx.linear.strategies.headwise",
}


def get_linear(name: str) -> LinearStrategy:
    if name not in MODULES:
        raise ConfigError(f"linear strategy {name!r} is unknown; valid strategies: {', '.join(MODULES)}")
    strategies: dict[str, LinearStrategy] = importlib.import_module(MODULES[name]).STRATEGIES
    return strategies[name]


def refusal(strategy: LinearStrategy, case: LinearCase) -> str | None:
    """Why the strategy does not execute this case exactly; None if it does."""
    if case.chunk < 1:
        return f"attention.chunk={case.chunk} must be at least 1 token; 64 is the default"
    if case.layout not in (*LAYOUTS, "explicit"):
        return f"layout {case.layout!r} is unknown; valid layouts: {', '.join(LAYOUTS)}"
    mixer = get_mixer(case.mixer)
    if mixer.transition == FETCHES:
        return _refused_without_states(strategy, case)
    if case.layout == "striped" and case.world > 1 and case.layout_block < case.chunk:
        return (
            f"attention.layout_block={case.layout_block} of the striped layout is smaller than "
            f"attention.chunk={case.chunk}: a state would travel for every block; nearest valid: "
            f"attention.layout_block={case.chunk}"
        )
    return strategy.refuses(case)


def _refused_without_states(strategy: LinearStrategy, case: LinearCase) -> str | None:
    """Of mixers that fetch tokens themselves: they read neither strategy nor chunk."""
    if strategy.name != DEFAULT:
        return (
            f"model.mixer={case.mixer} fetches tokens and has no states that a strategy could move; nearest valid: "
            f"{DEFAULT}, which stands for none"
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
    """Of strategies without a non-causal form."""
    if not case.causal:
        return "queries must not see later tokens here; attention.linear=lasp2 has a non-causal form"
    return None


def require_linear(strategy: LinearStrategy, case: LinearCase) -> None:
    reason = refusal(strategy, case)
    if reason:
        raise ConfigError(f"attention.linear={strategy.name} refuses: {reason}")
