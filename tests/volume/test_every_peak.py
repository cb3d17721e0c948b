"""Live bytes of every strategy, with all its choices, under any mask: never more than its closed form, and how near."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from benchmarks.tables.volume import ABOVE, WITHIN
from longctx.attention import AttentionCase, StrategyAttention
from longctx.attention.runtime.sizes import Sizes
from longctx.catalog import KERNELS
from longctx.operators import IMPLEMENTATIONS
from longctx.sim import Cluster
from longctx.verify.memory import PeakMemory
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import ESTIMATED, LAYOUTS, MASKS, PACKINGS, Case, Nothing, choices, costs, plan_of, with_row

LENGTH, DIM = 96, 16
WORLDS = (1, 2, 3, 4, 8)
HEADS = {"mha": (8, 8), "gqa": (8, 4), "mqa": (8, 1)}


@pytest.fixture(autouse=True)
def nothing(monkeypatch):
    monkeypatch.setitem(KERNELS, "nothing", f"{Nothing.__module__}:Nothing")


def alive(case: Case) -> tuple[int, int]:
    """Of the calling rank in the forward pass, and in both."""
    plan, (heads, kv_heads) = case.plan, case.heads
    q, k, v, dout = (
        torch.zeros(len(plan.documents), plan.shard, n, DIM, dtype=case.dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads, heads)
    )
    options = with_row(case.strategy, case.inner, case.options)
    attention = StrategyAttention(case.strategy, dist.group.WORLD, case.kernel, options=options)
    with PeakMemory(IMPLEMENTATIONS) as memory:
        out = attention(q, k, v, plan.handle)
        forward = memory.peak
        torch.autograd.grad(out, (q, k, v), dout.detach())
    return forward, memory.peak


def cases_of(strategy: str, layout: str, world: int, heads: str, packing: str, mask: str) -> list[Case]:
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], LENGTH, world)
    asked = AttentionCase(world, *HEADS[heads], layout.removesuffix("4"), plan.mask, documents=packing != "one")
    kernel = "auto" if strategy == "rsa" else "nothing"
    return [
        Case(strategy, plan, HEADS[heads], torch.bfloat16, inner, options, kernel)
        for inner, options in choices(strategy, asked)
    ]


def check(cases: list[Case]) -> None:
    by_rank = Cluster(cases[0].plan.world, trace=False).run(lambda: [alive(case) for case in cases])
    for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        sizes = Sizes(len(case.plan.documents), *case.heads, DIM, 2, 4, case.inner, case.options)
        published = costs(case.strategy).peak_memory(case.plan, sizes)
        forward, both = (max(peaks) for peaks in zip(*ranks, strict=True))
        most = max(published.forward, published.backward)
        said = f"{case.name}: {forward, both} of {published}"
        assert forward <= published.forward + WITHIN and both <= most + WITHIN, said
        above = ABOVE.get(case.strategy, 1.0)
        assert forward * above >= published.forward - WITHIN and both * above >= most - WITHIN, said


AXES = (ESTIMATED, tuple(LAYOUTS), WORLDS, tuple(HEADS), tuple(PACKINGS), tuple(MASKS), range(4))


@pytest.mark.parametrize("axes", pairwise(AXES), ids=str)
def test_sampled_peaks_are_what_is_alive(axes):
    *case, turn = axes
    taken = cases_of(*case)
    if taken[turn::4]:
        check(taken[turn::4])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_peak_is_what_is_alive(world, heads, layout):
    """With every packing and every mask; over the layouts with all pairs of both."""
    cases, turn = [], list(LAYOUTS).index(layout)
    pairs = zip(PACKINGS, [*list(MASKS)[turn:], *list(MASKS)[:turn]], strict=True)
    for strategy, (packing, mask) in itertools.product(ESTIMATED, pairs):
        cases += cases_of(strategy, layout, world, heads, packing, mask)
    check(cases)
