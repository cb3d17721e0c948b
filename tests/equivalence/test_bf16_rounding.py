"""bf16: what any strategy loses is at most 2.5 times what one device loses, with nothing to excuse it."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch.distributed as dist

from longctx.attention.registry import MODULES
from longctx.sequence import unshard
from longctx.sim import Cluster
from longctx.verify import VerifyCase, run_rank
from longctx.verify.case import ROUNDING_FACTOR
from longctx.verify.run import reference, tensor_errors
from tests.equivalence.pairwise import pairwise

TENSORS = ("out", "dq", "dk", "dv")

SEQ = 96
MASKS = {"causal": {}, "full": {"causal": False}, "documents": {"documents": (47, 1, 1, 47)}, "window": {"window": 19}}
HEADS = {"gqa": (4, 2), "mha": (4, 4)}
CHOICES = (("auto", "wide"), ("queries", "wide"), ("auto", "narrow"), ("queries", "narrow"))


def case_of(strategy: str, layout: str, mask: str, heads: str, world: int, backward: str, travel: str) -> VerifyCase:
    q_heads, kv_heads = HEADS[heads]
    return VerifyCase(
        strategy, layout, world, seq=SEQ, heads=q_heads, kv_heads=kv_heads, head_dim=16, dtype="bfloat16",
        backward=backward, travel=travel, **MASKS[mask],
    )  # fmt: skip


def errors_of(case: VerifyCase) -> dict[str, float]:
    """Relative, of the worst rank, against float64 on the same rounded inputs."""
    ranks = Cluster(case.world, trace=False).run(lambda: run_rank(case, dist.group.WORLD))
    whole = {name: unshard([rank.tensors[name] for rank in ranks], case.plan()) for name in TENSORS}
    return tensor_errors(case, case.plan(), whole, reference(case))


@cache
def alone(mask: str, heads: str) -> dict[str, float]:
    """Of the same kernel on one device."""
    return errors_of(case_of("local", "contiguous", mask, heads, 1, "auto", "wide"))


def check(strategy, layout, mask, heads, world, choice) -> bool:
    case = case_of(strategy, layout, mask, heads, world, *choice)
    if case.refused():
        return False
    found, allowed = errors_of(case), alone(mask, heads)
    for name in TENSORS:
        assert found[name] <= ROUNDING_FACTOR * allowed[name], f"{name}: {found[name] / allowed[name]:.2f} times"
    return True


STRATEGIES = tuple(name for name in MODULES if name != "local")
LAYOUTS = ("contiguous", "zigzag", "striped")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_loses_no_more_than_one_device_does(strategy):
    axes = (LAYOUTS, tuple(MASKS), tuple(HEADS), (4, 2), CHOICES[:1])
    checked = [check(strategy, *axis) for axis in pairwise(axes)]
    assert any(checked)


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_case_loses_no_more_than_one_device_does(strategy, heads, mask):
    for layout, world, choice in itertools.product(LAYOUTS, (2, 4, 8), CHOICES):
        check(strategy, layout, mask, heads, world, choice)
