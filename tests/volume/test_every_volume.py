"""Bytes and messages of every strategy, with all of its choices: the closed form is what sim's ledger carried."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from longctx.attention import AttentionCase
from longctx.catalog import KERNELS
from longctx.sequence import SequencePlan
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import ESTIMATED, LAYOUTS, MASKS, PACKINGS, Case, Nothing, choices, measured_together, plan_of

LENGTH = 96
WORLDS = (2, 3, 4, 8)
HEADS = {"mha": (24, 24), "gqa": (24, 8), "gqa shared": (24, 3)}  # the last: ranks of Ulysses share heads of keys
SPLIT_HEADS = ("ulysses", "usp", "gather")  # to all others heads are no more than bytes of a token


def cases_of(
    strategy: str, layout: str, heads: str, packing: str, plan: SequencePlan, kernel: str = "auto"
) -> Iterator[Case]:
    """Every choice of a strategy; none where it refuses."""
    documents = packing != "one"
    asked = AttentionCase(plan.world, *HEADS[heads], layout.removesuffix("4"), plan.mask, documents=documents)
    for inner, options in choices(strategy, asked):
        dtype = torch.bfloat16 if options.grad_dtype == "compute" else torch.float32
        yield Case(strategy, plan, HEADS[heads], dtype, inner, options, "auto" if strategy == "rsa" else kernel)


def check(cases: list[Case]) -> None:
    for case, sent in zip(cases, measured_together(cases), strict=True):
        assert sent == case.closed(), case.name


AXES = (ESTIMATED, tuple(LAYOUTS), WORLDS, tuple(HEADS), tuple(PACKINGS), tuple(MASKS), range(4))


@pytest.mark.parametrize("axes", pairwise(AXES), ids=str)
def test_sampled_volumes_are_what_was_sent(axes):
    strategy, layout, world, heads, packing, mask, turn = axes
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], LENGTH, world)
    taken = list(cases_of(strategy, layout, heads, packing, plan))
    if taken[turn::4]:
        check(taken[turn::4])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "strategies"), [("mha", ESTIMATED), ("gqa", ESTIMATED), ("gqa shared", SPLIT_HEADS)])
@pytest.mark.parametrize("world", WORLDS)
def test_every_volume_is_what_was_sent(world, heads, strategies, layout, monkeypatch):
    """Strategies with all their choices, packings and masks. Kernels compute nothing here; in the sample they do."""
    monkeypatch.setitem(KERNELS, "nothing", f"{Nothing.__module__}:Nothing")
    cases = []
    for packing, mask in itertools.product(PACKINGS, MASKS):
        plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], LENGTH, world)
        for strategy in strategies:
            cases += cases_of(strategy, layout, heads, packing, plan, "nothing")
    check(cases)
    refused = {"local"} if layout.startswith("striped") else {"local", "striped"}
    assert {case.strategy for case in cases} == set(strategies) - refused
