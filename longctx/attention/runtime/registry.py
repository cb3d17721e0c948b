"""What strategies exist, and what each of them executes exactly.

A strategy declares its limits here and nowhere else; the configuration, the library and ``longctx verify``
refuse by this declaration before any work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from longctx.attention.runtime.operator import DEFAULT, Attend, StrategyOptions
from longctx.errors import ConfigError
from longctx.planner import Topology
from longctx.sequence import LAYOUTS, Mask, SequencePlan


@dataclass(frozen=True)
class AttentionCase:
    """What is asked of a strategy: the sequence group's size, head counts of one rank, layout, mask and options.

    ``inner``: neighbours that make one row of the group seen as a grid; None leaves it to the strategy.
    ``documents``: whether a sequence may hold several documents that do not see each other. ``tail``: whether
    recompute keeps the later half of its outputs alone.
    """

    world: int
    heads: int
    kv_heads: int
    layout: str
    mask: Mask
    inner: int | None = None
    options: StrategyOptions = DEFAULT
    documents: bool = False
    kernel: str = "auto"
    tail: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a layer's tensors weigh on their way. ``element``: bytes of a number of q, k and v; ``wide``: of an
    accumulator. ``inner``: as in ``AttentionCase``, resolved. ``topology``: how ranks lie on nodes; None: on one."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    wide: int
    inner: int = 1
    options: StrategyOptions = DEFAULT
    topology: Topology | None = None

    @property
    def keys(self) -> int:
        """Bytes of one token's keys (or values) over the batch."""
        return self.batch * self.kv_heads * self.head_dim * self.element

    @property
    def key_gradients(self) -> int:
        """Bytes of one token's dk (or dv) as they are summed."""
        return self.batch * self.kv_heads * self.head_dim * self.wide

    @property
    def queries(self) -> int:
        """Bytes of one token's queries (or out, or dout)."""
        return self.batch * self.heads * self.head_dim * self.element

    @property
    def query_gradients(self) -> int:
        """Bytes of one token's dq, or of a partial out, as they are summed."""
        return self.batch * self.heads * self.head_dim * self.wide

    def held(
        self, queries: float = 0, outputs: float = 0, sums: float = 0, keys: float = 0, gradients: float = 0
    ) -> int:
        """Bytes of one token's so many queries (or out, dout), outputs (or dq) and log-sum-exps as they are summed,
        keys with values, and gradients of both."""
        wide = outputs * self.query_gradients + sums * self.lse + 2 * gradients * self.key_gradients
        return round(queries * self.queries + wide + 2 * keys * self.keys)

    @property
    def lse(self) -> int:
        """Bytes of one token's log-sum-exp (or of its delta)."""
        return self.batch * self.heads * self.wide


@dataclass(frozen=True)
class Volume:
    """What one rank sends in one layer: bytes, then messages."""

    forward: int
    backward: int
    messages_forward: int
    messages_backward: int

    def __add__(self, other: Volume) -> Volume:
        return Volume(
            self.forward + other.forward,
            self.backward + other.backward,
            self.messages_forward + other.messages_forward,
            self.messages_backward + other.messages_backward,
        )


def work_at_home(plan: SequencePlan, rank: int, inner: int) -> float:
    """Where each rank computes for its own queries."""
    return plan.work(rank)


def work_at_keys(plan: SequencePlan, rank: int, inner: int) -> float:
    """Where queries visit the ranks whose keys they see."""
    return sum(tiles.cells for owner in range(plan.world) for tiles in plan.tiles(owner, rank))


def nothing_ahead(plan: SequencePlan, rank: int, sizes: Sizes) -> None:
    """Where plans follow from the layout alone."""


Sent = tuple[int, Volume]  # what one message of one rank costs, by the receiver's rank in the sequence group


def summed(sends: Callable[[SequencePlan, int, Sizes], list[Sent]]) -> Callable[[SequencePlan, int, Sizes], Volume]:
    """The volume of a strategy that publishes what it sends to whom."""
    return lambda plan, rank, sizes: sum((cost for _, cost in sends(plan, rank, sizes)), Volume(0, 0, 0, 0))


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors alive at one time on a rank beside q, k, v and dout, results included, kernels' workspace apart.

    In 16-bit dtypes never less, under any mask, and of most strategies just that; docs/volume.md names the others.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Strategy:
    """A registered strategy. ``volume(plan, rank, sizes)`` is its closed form, ``peak(plan, sizes)`` that of memory,
    ``work(plan, rank, inner)`` the (query, key) cells that a rank computes, in all its heads. ``prepare(plan, rank,
    sizes)`` makes on the host, ahead of time, what a strategy of tasks would otherwise plan at its first use.

    ``takes``: which of ``StrategyOptions`` and ``inner`` it reads; others are refused. ``inner``: for strategies that
    see their ranks as a grid, its row where the user has not named one; None for all others. ``two_way``: it wants a
    second channel between its ranks (``Group.back``). ``tail``: it can compute the earlier half of each rank's queries
    alone, which sends ``volume(plan.head, rank, sizes).forward``. ``sends``: the terms of ``volume`` by receiver, from
    strategies that publish them: what crosses between nodes follows from these.
    """

    name: str
    operator: Attend
    layout: str  # what it prefers
    refuses: Callable[[AttentionCase], str | None]
    volume: Callable[[SequencePlan, int, Sizes], Volume]
    peak: Callable[[SequencePlan, Sizes], Peak]
    takes: frozenset[str] = frozenset()
    inner: Callable[[AttentionCase], int] | None = None
    two_way: bool = False
    work: Callable[[SequencePlan, int, int], float] = work_at_home
    tail: bool = False
    sends: Callable[[SequencePlan, int, Sizes], list[Sent]] | None = None
    prepare: Callable[[SequencePlan, int, Sizes], None] = nothing_ahead


# Name of an option -> what leaves it to the strategy, and the words that are valid (none for a number).
OPTIONS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "backward": ("auto", ("auto", "keys", "queries")),
    "travel": ("wide", ("wide", "narrow")),
    "inner": (None, ()),
}

# Name of the strategy -> module that registers it; each module holds `STRATEGIES`.
MODULES = {
    "local": "longctx.attention.strategies.local",
    "ring": "longctx.attention.strategies.ring",
    "striped": "longctx.attention.strategies.ring",
    "burst": "longctx.attention.strategies.burst",
    "token_ring": "longctx.attention.strategies.token_ring",
    "ulysses": "longctx.attention.strategies.ulysses",
    "usp": "longctx.attention.strategies.usp",
    "gather": "longctx.attention.strategies.gather",
    "tree": "longctx.attention.strategies.tree",
    "rsa": "longctx.attention.strategies.rsa",
    "disaggregated": "longctx.attention.strategies.disaggregated.execute",
    "zeppelin": "longctx.attention.strategies.disaggregated.execute",
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
    return _option_refused(strategy, case) or strategy.refuses(case)


def inner_of(strategy: Strategy, case: AttentionCase) -> int:
    """Neighbours in one row of the grid, for a case that the strategy does not refuse; 1 where there is no grid."""
    if case.inner is not None:
        return case.inner
    return 1 if strategy.inner is None else strategy.inner(case)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def choice_refused(strategy: Strategy, given: Mapping[str, object]) -> str | None:
    """Why one of these of ``OPTIONS`` is none of the strategy's; None if all are."""
    for name, value in given.items():
        default, valid = OPTIONS[name]
        if value == default:
            continue
        if name not in strategy.takes:
            return f"attention.{name}={value}: it has no such choice; leave it at {default or 'null'}"
        if valid and value not in valid:
            return f"attention.{name}={value} is unknown; valid: {', '.join(valid)}"
    return None


def _option_refused(strategy: Strategy, case: AttentionCase) -> str | None:
    reason = choice_refused(strategy, {**vars(case.options), "inner": case.inner})
    if reason:
        return reason
    if case.tail and not strategy.tail:
        return (
            "train.recompute_keep=[attention_tail]: it computes all of a rank's queries or none; use "
            "train.recompute_keep=[attention], or attention=burst"
        )
    if case.inner is not None and (case.inner < 1 or case.world % case.inner):
        whole = [n for n in divisors(case.world) if strategy.refuses(replace(case, inner=n)) is None]
        nearest = min(whole, key=lambda n: abs(n - (case.inner or 1)))
        return (
            f"attention.inner={case.inner} must divide the {case.world} ranks of a sequence; nearest valid: {nearest}"
        )
    return None


def require(strategy: Strategy, case: AttentionCase) -> None:
    reason = refusal(strategy, case)
    if reason:
        raise ConfigError(f"attention.strategy={strategy.name} refuses: {reason}")
