"""Checks that a plan is legal: each visible cell once, and whatever a task reads where it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longctx.errors import ConfigError
from longctx.planner.plan import Plan
from longctx.planner.slices import Int64, Slice, areas
from longctx.planner.transfers import Transfers


def check(plan: Plan) -> None:
    """Raises ConfigError unless a plan is legal, in integers, for any mask.

    It is for tests and plans made by hand, and too slow for every batch. Every visible cell belongs to exactly one task
    per heads group. Each task's rows live on its home. Each server gets every row and key that its tasks read, none
    twice in one exchange.
    """
    tasks, mask, home = plan.tasks, plan.mask, plan.home
    columns = [tasks.q0, tasks.q1, tasks.k0, tasks.k1, tasks.lo, tasks.hi]
    _require(np.all(tasks.area > 0), "a task without cells")
    for name, values, count in (
        ("server", tasks.server, home.ranks),
        ("heads group", tasks.group, plan.groups),
        ("document", tasks.doc, len(home.lengths)),
    ):
        outside = np.unique(values[(values < 0) | (values >= count)]).tolist()
        _require(not outside, f"tasks of {name} {outside}, which must be in [0, {count})")
    for group in range(plan.groups):
        for doc in range(len(home.lengths)):
            own = np.flatnonzero((tasks.doc == doc) & (tasks.group == group))
            allowed = mask.of(doc)
            total = sum(one.area for one in allowed)
            _require(tasks.area[own].sum() == total, f"document {doc}: tasks have other cells than the mask")
            table = [column[own] for column in columns]
            inside = sum(_shared(table, [np.array([v]) for v in _fields(one)]).sum(axis=1) for one in allowed)
            _require(np.array_equal(inside, tasks.area[own]), f"document {doc}: a task outside the mask")
            common = _shared(table, table)
            _require(np.array_equal(common.sum(axis=1), tasks.area[own]), f"document {doc}: two tasks share cells")
    _check_homes(plan)
    for moves, low, high in ((plan.q, tasks.q0, tasks.q1), (plan.kv, tasks.k0, tasks.k1)):
        _check_moves(plan, moves, low, high)


def _require(legal: bool | np.bool_, what: str) -> None:
    if not legal:
        raise ConfigError(f"the plan is not legal: {what}")


def _fields(one: Slice) -> tuple[int, ...]:
    return one.q0, one.q1, one.k0, one.k1, one.lo, one.hi


def _shared(a: Sequence[Int64], b: Sequence[Int64]) -> Int64:
    """Returns how many cells slices of ``a`` and of ``b`` have in common, int64 ``[A, B]``."""
    low = [np.maximum(a[i][:, None], b[i][None]) for i in (0, 2, 4)]
    high = [np.minimum(a[i][:, None], b[i][None]) for i in (1, 3, 5)]
    cells = areas(low[0], high[0], low[1], high[1], low[2], np.maximum(high[2], low[2] - 1))
    return np.asarray(cells)


def _check_homes(plan: Plan) -> None:
    home, tasks = plan.home, plan.tasks
    key, doc, start, stop, rank, _ = home.table
    at = np.searchsorted(key, tasks.doc * home.stride + tasks.q0, "right") - 1
    lives = (doc[at] == tasks.doc) & (rank[at] == tasks.home) & (tasks.q1 <= stop[at]) & (tasks.q0 >= start[at])
    _require(lives.all(), "a task's rows do not live on its home")


def _check_moves(plan: Plan, moves: Transfers, low: Int64, high: Int64) -> None:
    home, tasks = plan.home, plan.tasks
    key, doc, start, _, rank, offset = home.table
    at = np.searchsorted(key, moves.doc * home.stride + moves.start, "right") - 1
    _require(np.array_equal(doc[at], moves.doc) and np.array_equal(rank[at], moves.source), "sent from elsewhere")
    _require(np.array_equal(offset[at] + moves.start - start[at], moves.offset), "sent from a wrong place")
    stride, docs = home.stride, len(home.lengths)
    base = ((moves.dest * plan.groups + moves.group) * docs + moves.doc) * stride
    order = np.argsort(base + moves.start)
    begin, end = (base + moves.start)[order], (base + moves.stop)[order]
    _require(np.all(begin[1:] >= end[:-1]), "a token comes twice")
    # Rows of [low, high) that arrive = rows asked for: count arrivals before either end.
    before = np.append(0, np.cumsum(end - begin))
    requested = ((tasks.server * plan.groups + tasks.group) * docs + tasks.doc) * stride

    def arrived(position: Int64) -> Int64:
        at = np.searchsorted(begin, position, "right") - 1
        inside = np.where(at >= 0, np.clip(position - begin[at], 0, (end - begin)[at]), 0)
        return np.asarray(np.where(at >= 0, before[at], 0) + inside)

    _require(np.array_equal(arrived(requested + high) - arrived(requested + low), high - low), "a task misses rows")
