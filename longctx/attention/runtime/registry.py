"""The declaration of a strategy of softmax attention: its operator, what it reads, and what it refuses.

Each strategy's file ends with its declaration; ``longctx.catalog`` maps its name to it. The configuration, the library
and ``longctx verify`` refuse by it before any work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from longctx.attention.costs.estimate import Costs
from longctx.attention.runtime.operator import Attend
from longctx.attention.runtime.sizes import Sizes
from longctx.catalog import LAYOUTS, STRATEGIES
from longctx.errors import ConfigError
from longctx.options import DEFAULT, OPTIONS, StrategyOptions
from longctx.rules import as_word, divisors, whole
from longctx.sequence import Mask, SequencePlan


@dataclass(frozen=True)
class AttentionCase:
    """Describes what is asked of a strategy: ranks, heads of one rank, layout, mask and options.

    ``documents``: whether a sequence may hold several documents that do not see each other. ``half``: whether recompute
    keeps the later half of its outputs alone.
    """

    world: int
    heads: int
    kv_heads: int
    layout: str
    mask: Mask
    options: StrategyOptions = DEFAULT
    documents: bool = False
    kernel: str = "auto"
    half: bool = False


def work_of_queries(plan: SequencePlan, rank: int, inner: int) -> float:
    """Returns the cells that a rank computes where each computes for its own queries."""
    return plan.work(rank)


def work_at_keys(plan: SequencePlan, rank: int, inner: int) -> float:
    """Returns the cells that a rank computes where queries visit the ranks whose keys they see."""
    return sum(tiles.cells for owner in range(plan.world) for tiles in plan.tiles(owner, rank))


def prepares_nothing(plan: SequencePlan, rank: int, sizes: Sizes) -> None:
    """Prepares nothing, for plans that follow from the layout alone."""


def refuses_nothing(case: AttentionCase) -> str | None:
    """Refuses no case."""
    return None


@dataclass(frozen=True)
class Grid:
    """Describes how a strategy arranges its ranks in rows of neighbours.

    ``row``: ranks in a row, where the user has not named a number. ``option``: the field of ``StrategyOptions`` that
    names it; None: users have no choice.
    """

    row: Callable[[AttentionCase], int]
    option: str | None = None


@dataclass(frozen=True)
class Strategy:
    """Declares a strategy.

    ``layout``: the one it prefers. ``refuses``: why it does not execute a case exactly. ``options``: the fields of
    ``StrategyOptions`` that it reads; others are refused. ``one_rank``: it wants whole sequences. ``two_way``: it wants
    a second channel between its ranks (``Group.back``). ``half``: it can compute the earlier half of each rank's
    queries alone. ``serves_tasks``: any rank computes for any other, so that messages may be routed and stages may
    serve one another. ``ping_pong``: it can be taken apart for two halves of a micro-batch that take turns.

    ``work(plan, rank, inner)``: the (query, key) cells that a rank computes, in all its heads. ``prepare(plan, rank,
    sizes)`` makes on the host, ahead of time, what a strategy of tasks would otherwise plan at its first use.
    ``costs``: its estimate of bytes and memory, or ``module:attribute`` of it; nothing that runs needs one.
    """

    name: str
    operator: Attend
    layout: str = "zigzag"
    refuses: Callable[[AttentionCase], str | None] = refuses_nothing
    options: frozenset[str] = frozenset()
    grid: Grid | None = None
    one_rank: bool = False
    two_way: bool = False
    half: bool = False
    serves_tasks: bool = False
    ping_pong: bool = False
    work: Callable[[SequencePlan, int, int], float] = work_of_queries
    prepare: Callable[[SequencePlan, int, Sizes], None] = prepares_nothing
    costs: Costs | str | None = None


def get_strategy(name: str) -> Strategy:
    """Returns the strategy of that name. Raises ``ConfigError`` with the nearest valid one."""
    found: Strategy = STRATEGIES.load(name)
    return found


def first_able(able: Callable[[Strategy], bool]) -> str:
    """Returns the name of the first strategy in the catalog that is ``able``, to recommend in place of another."""
    return next(name for name in STRATEGIES if able(get_strategy(name)))


def costs_of(strategy: Strategy) -> Costs | None:
    """Returns the strategy's estimate of bytes and memory, if it has one."""
    if not isinstance(strategy.costs, str):
        return strategy.costs
    module, _, attribute = strategy.costs.partition(":")
    found: Costs = getattr(importlib.import_module(module), attribute)
    return found


def refusal(strategy: Strategy, case: AttentionCase) -> str | None:
    """Returns why the strategy does not execute this case exactly; None if it does."""
    for what in ("world", "heads", "kv_heads"):
        whole(what, getattr(case, what), 1)
    if case.heads % case.kv_heads:
        nearest = max(n for n in range(1, case.kv_heads + 1) if case.heads % n == 0)
        return (
            f"{case.heads} query heads do not divide over {case.kv_heads} key/value heads; "
            f"nearest valid: kv_heads={nearest}"
        )
    if case.layout not in (*LAYOUTS, "explicit"):
        return f"layout {case.layout!r} is unknown; valid layouts: {', '.join(LAYOUTS)}"
    if strategy.one_rank and case.world != 1:
        other = first_able(lambda one: not one.one_rank)
        return f"{case.world} ranks share the sequence; it computes on one: set parallel.sp=1, or attention={other}"
    return option_refused(strategy, case.options) or _case_refused(strategy, case) or strategy.refuses(case)


def option_refused(strategy: Strategy, options: StrategyOptions) -> str | None:
    """Returns why the strategy does not take one of these options; None if it takes them all."""
    for name, value in options.chosen().items():
        if name not in strategy.options:
            return f"attention.{name}={value}: it has no such choice; leave it at {as_word(OPTIONS[name])}"
    try:
        options.check()
    except ConfigError as error:
        return str(error)
    return None


def _case_refused(strategy: Strategy, case: AttentionCase) -> str | None:
    if case.half and not strategy.half:
        able = first_able(lambda one: one.half and not one.one_rank)
        return (
            "train.recompute_keep=[attention_half]: it computes all of a rank's queries or none; use "
            f"train.recompute_keep=[attention], or attention={able}"
        )
    row = chosen_row(strategy, case.options)
    if row is not None and case.world % row:
        assert strategy.grid is not None and strategy.grid.option is not None, "or no row is chosen"
        option = strategy.grid.option
        whole = [
            n
            for n in divisors(case.world)
            if strategy.refuses(replace(case, options=_with_row(case.options, option, n))) is None
        ]
        nearest = min(whole, key=lambda n: abs(n - row))
        return f"attention.{option}={row} must divide the {case.world} ranks of a sequence; nearest valid: {nearest}"
    return None


def chosen_row(strategy: Strategy, options: StrategyOptions) -> int | None:
    """Returns how many ranks the user has put in a row of the grid; None without a grid or a choice."""
    if strategy.grid is None or strategy.grid.option is None:
        return None
    row: int | None = getattr(options, strategy.grid.option)
    return row


def inner_of(strategy: Strategy, case: AttentionCase) -> int:
    """Returns how many ranks are in a row of the grid, for a case that is not refused; 1 without a grid."""
    if strategy.grid is None:
        return 1
    return chosen_row(strategy, case.options) or strategy.grid.row(case)


def settled(strategy: Strategy, case: AttentionCase) -> StrategyOptions:
    """Returns the case's options, with the strategy's own row of the grid where the user has named none."""
    if strategy.grid is None or strategy.grid.option is None:
        return case.options
    return _with_row(case.options, strategy.grid.option, inner_of(strategy, case))


def _with_row(options: StrategyOptions, name: str, row: int) -> StrategyOptions:
    return StrategyOptions(**{**vars(options), name: row})


def require(strategy: Strategy, case: AttentionCase) -> None:
    """Refuses a case that the strategy does not execute exactly. Raises ``ConfigError``."""
    reason = refusal(strategy, case)
    if reason:
        raise ConfigError(f"attention.strategy={strategy.name} refuses: {reason}")
