"""The formulas of peak memory in docs/attention.md are what is alive on sim, behind a kernel that needs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention
from longctx.attention.runtime.head_sharding import HeadGroups
from longctx.attention.runtime.sizes import Sizes
from longctx.catalog import KERNELS
from longctx.operators import IMPLEMENTATIONS
from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence import Mask, SequencePlan
from longctx.sim import Cluster
from longctx.verify.memory import PeakMemory
from tests.volume.measure import LAYOUTS, Nothing, costs, plan_of, with_row
from tests.volume.test_documented_forms import PAGE, ROW, value

WORLD, ROWS, DIM = 8, 64, 8


@pytest.fixture(autouse=True)
def nothing(monkeypatch):
    monkeypatch.setitem(KERNELS, "nothing", f"{Nothing.__module__}:Nothing")


def peaks(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    inner: int,
    options: StrategyOptions,
    kernel: str = "nothing",
) -> tuple[int, int]:
    """Of the calling rank in forward and in both passes, of which the backward pass has the higher."""
    q, k, v, dout = (
        torch.randn(len(plan.documents), plan.shard, n, DIM).bfloat16().requires_grad_()
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    attention = StrategyAttention(strategy, dist.group.WORLD, kernel, options=with_row(strategy, inner, options))
    with PeakMemory(IMPLEMENTATIONS) as memory:
        out = attention(q, k, v, plan.handle)
        forward = memory.peak
        torch.autograd.grad(out, (q, k, v), dout.detach())
    return forward, memory.peak


def documented() -> list[tuple[str, str, str, str]]:
    section = PAGE.read_text(encoding="utf-8").partition("## Peak extra memory")[2].partition("\n## ")[0]
    return [row for row in ROW.findall(section) if row[2] != "forward"]


def test_the_table_was_read():
    assert len(documented()) == 9


ONE_EACH = (2, 2)  # heads of which a rank of two has one: they make one group


def rows_with(*heads: tuple[int, int]) -> list[Any]:
    """Every row with these heads; of Ulysses and USP, with those that make as many groups as it says."""
    return [
        pytest.param(row, some, id=f"{row[0]} {row[1]} {some}")
        for row in documented()
        for some in ((ONE_EACH, *heads) if "group" in row[1] else heads)
        if "group" not in row[1] or groups_of(row[0], some) == row[1]
    ]


def groups_of(strategy: str, heads: tuple[int, int]) -> str | None:
    ranks = inner_of(strategy)
    if heads[0] % ranks:
        return None
    return {1: "one group", 2: "two groups"}[HeadGroups.of(*heads, ranks).count]


def inner_of(strategy: str) -> int:
    return {"ulysses": WORLD, "usp": 2, "burst": WORLD}.get(strategy, 1)


def options_of(side: str) -> StrategyOptions:
    return StrategyOptions(backward_rotates=side) if side in ("kv", "q") else DEFAULT


def ratios(row, layout: str, mask: Mask, lengths: tuple[int, ...], heads: tuple[int, int]) -> list[tuple[int, Any]]:
    """(measured, formula) of every rank and pass."""
    strategy, side, *formulas = row
    plan = plan_of([lengths], mask, LAYOUTS[layout], ROWS * WORLD, WORLD)
    h, k = heads
    names = {"Q": ROWS * h * DIM, "V": 2 * ROWS * k * DIM, "L": ROWS * h, "P": WORLD, "e": 2, "w": 4}
    ranks = Cluster(WORLD, trace=False).run(peaks, strategy, plan, heads, inner_of(strategy), options_of(side))
    return [pair for found in ranks for pair in zip(found, (value(one, names) for one in formulas), strict=True)]


@pytest.mark.parametrize(("row", "heads"), rows_with((8, 8), (16, 8), (16, 16)))
def test_it_is_what_is_alive_without_a_mask(row, heads):
    for measured, formula in ratios(row, "contiguous", Mask(False), (ROWS * WORLD,), heads):
        assert 0 <= measured - formula <= 100


@pytest.mark.parametrize(("row", "heads"), rows_with((8, 8), (16, 16), (32, 8)))
def test_it_is_what_the_strategies_publish(row, heads):
    (strategy, side, *formulas), (h, k) = row, heads
    plan = plan_of([(ROWS * WORLD,)], Mask(False), LAYOUTS["contiguous"], ROWS * WORLD, WORLD)
    sizes = Sizes(1, h, k, DIM, 2, 4, inner_of(strategy), options_of(side))
    published = costs(strategy).peak_memory(plan, sizes)
    names = {"Q": ROWS * h * DIM, "V": 2 * ROWS * k * DIM, "L": ROWS * h, "P": WORLD, "e": 2, "w": 4}
    assert (published.forward, published.backward) == tuple(value(one, names) for one in formulas)


@pytest.mark.parametrize("strategy", ["local", "burst", "rsa"])
def test_what_the_table_has_no_row_for_is_a_bound_too(strategy):
    """Whole sequences, a double ring, and rows of scores (by its own products, not by a kernel)."""
    world, inner = {"local": (1, 1), "burst": (8, 2), "rsa": (4, 1)}[strategy]
    plan = plan_of([(ROWS * world,)], Mask(False), LAYOUTS["contiguous"], ROWS * world, world)
    options = StrategyOptions(backward_rotates="kv") if strategy == "burst" else DEFAULT
    kernel = "auto" if strategy == "rsa" else "nothing"
    published = costs(strategy).peak_memory(plan, Sizes(1, 8, 8, DIM, 2, 4, inner, options))
    ranks = Cluster(world, trace=False).run(peaks, strategy, plan, (8, 8), inner, options, kernel)
    for forward, backward in ranks:
        assert published.forward * 0.9 <= forward <= published.forward + 100
        assert published.backward * 0.9 <= backward <= published.backward + 100


@pytest.mark.parametrize(("row", "heads"), rows_with((8, 8), (16, 16)))
@pytest.mark.parametrize(
    ("layout", "causal", "lengths"),
    [
        ("zigzag", True, (512,)),
        ("contiguous", True, (512,)),
        ("striped", True, (200, 1, 1, 250, 60)),
        ("zigzag", False, (200, 1, 1, 250, 60)),
    ],
)
def test_with_a_mask_it_is_at_most_a_third_more(row, heads, layout, causal, lengths):
    for measured, formula in ratios(row, layout, Mask(causal), lengths, heads):
        assert measured <= formula * 4 / 3 + 100


@pytest.mark.parametrize("strategy", ["disaggregated", "zeppelin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_planner_has_assigned_has_a_bound(strategy, layout):
    for lengths in ((ROWS * WORLD,), (300, 1, 1, 150, 60)):
        plan = plan_of([lengths], Mask(), LAYOUTS[layout], ROWS * WORLD, WORLD)
        ranks = Cluster(WORLD, trace=False).run(peaks, strategy, plan, (16, 8), 1, DEFAULT)
        peak = costs(strategy).peak_memory(plan, Sizes(1, 16, 8, DIM, 2, 4))
        assert max(forward for forward, _ in ranks) <= peak.forward
        assert 0.4 * peak.backward <= max(both for _, both in ranks) <= peak.backward
