"""A document without numbers stays by itself: nothing of it reaches other documents' rows or gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import StrategyAttention
from longctx.catalog import KERNELS, STRATEGIES
from longctx.sequence import Documents, Mask, SequencePlan, make_layout, unshard
from longctx.sim import Cluster
from longctx.verify.run import cut

# Single tokens in a row, edges inside and on shards, and padding, of which something is asked too.
PACKED, LENGTH = ((9, 1, 1, 1, 6, 1, 17), (1, 1, 20, 8, 1, 1)), 38
BAD, MASKS = (3, 2), (Mask(), Mask(window=3), Mask(False), Mask(False, 1), Mask(window=1))
VALUES = (math.nan, math.inf, -math.inf)
LAYOUTS = ("contiguous", "zigzag", "striped")
CASES = [
    case for case in itertools.product(STRATEGIES, LAYOUTS) if case[0] not in ("rsa", "striped") or case[1] == case[0]
]


def rows_of_bad() -> Tensor:
    """The rows of one document in each sequence, and of padding, bool ``[B, S]``."""
    found = torch.zeros(len(PACKED), LENGTH, dtype=torch.bool)
    for row, (lengths, bad) in enumerate(zip(PACKED, BAD, strict=True)):
        found[row, sum(lengths[:bad]) : sum(lengths[: bad + 1])] = True
        found[row, sum(lengths) :] = True
    return found


def computed(strategy: str, plan: SequencePlan, kernel: str, spoiled: dict[str, Tensor]) -> list[Tensor]:
    """out, dq, dk and dv of whole sequences."""

    def rank_main() -> list[Tensor]:
        q, k, v, dout = (cut(spoiled[name], plan, dist.get_rank()) for name in ("q", "k", "v", "dout"))
        leaves = [one.requires_grad_() for one in (q, k, v)]
        out = StrategyAttention(strategy, dist.group.WORLD, kernel)(*leaves, plan.handle)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    ranks = Cluster(plan.world, trace=False).run(rank_main)
    return [unshard(list(parts), plan) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("strategy, layout", CASES)
def test_a_document_without_numbers_stays_by_itself(strategy, layout):
    number = CASES.index((strategy, layout))
    kernels = [name for name in KERNELS if name != "flash_cuda"] if strategy != "rsa" else ["auto"]
    world, draw = (1 if strategy == "local" else 3), torch.Generator().manual_seed(number)
    documents = tuple(Documents.from_lengths(lengths) for lengths in PACKED)
    plan = SequencePlan(documents, MASKS[number % len(MASKS)], make_layout(layout), LENGTH, world)
    heads = {"q": 6, "k": 3, "v": 3, "dout": 6}
    clean = {
        name: torch.randn(2, LENGTH, count, 8, generator=draw, dtype=torch.float64) for name, count in heads.items()
    }
    bad = rows_of_bad()
    expected = computed(strategy, plan, kernels[number % len(kernels)], clean)
    spoiled = {name: whole.masked_fill(bad[..., None, None], VALUES[number % 3]) for name, whole in clean.items()}
    found = computed(strategy, plan, kernels[number % len(kernels)], spoiled)
    for name, mine, right in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert torch.equal(mine[~bad], right[~bad]), f"{name} of other documents"
    assert not found[0][0, :, :, :][rows_of_bad()[0, :LENGTH]][0].isfinite().any(), "and is no number itself"
