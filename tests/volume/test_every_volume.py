"""Bytes and messages of every strategy, with all of its choices: the closed form is what sim's ledger carried."""

import itertools

import pytest
import torch

from longctx.attention import AttentionCase
from longctx.attention.registry import MODULES
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import LAYOUTS, MASKS, PACKINGS, assert_volume, choices, plan_of

WORLDS = (2, 3, 4, 8)
HEADS = {"mha": (24, 24), "gqa": (24, 8), "gqa shared": (24, 3)}  # the last: ranks of Ulysses share heads of keys


def check(strategy, layout, world, heads, packing, mask, turn=None) -> int:
    """How many of the strategy's choices were held to their closed forms: all, or every fourth from a turn on."""
    case = AttentionCase(world, *HEADS[heads], layout.removesuffix("4"), MASKS[mask], documents=packing != "one")
    plan, taken = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], 96, world), list(choices(strategy, case))
    for inner, options in taken if turn is None else taken[turn::4]:
        dtype = torch.bfloat16 if options.travel == "narrow" else torch.float32
        assert_volume(strategy, plan, HEADS[heads], dtype, inner, options)
    return len(taken)


AXES = (tuple(MODULES), tuple(LAYOUTS), WORLDS, tuple(HEADS), tuple(PACKINGS), tuple(MASKS), range(4))


@pytest.mark.parametrize("axes", pairwise(AXES), ids=str)
def test_sampled_volumes_are_what_was_sent(axes):
    check(*axes)


@pytest.mark.matrix
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("strategy", [name for name in MODULES if name != "local"])
def test_every_volume_is_what_was_sent(strategy, heads, world):
    product = itertools.product(LAYOUTS, PACKINGS, MASKS)
    assert sum(check(strategy, layout, world, heads, *masks) for layout, *masks in product)
