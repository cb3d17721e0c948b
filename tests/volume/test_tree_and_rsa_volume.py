"""What tree attention and ring self-attention send: the ledger, their closed forms, and counts by hand."""

import itertools

import numpy as np
import pytest
import torch

from longctx.options import StrategyOptions
from longctx.sequence import Documents, Mask, SequencePlan
from tests.volume.measure import BYTES, DIM, LAYOUTS, closed, measured
from tests.volume.ring_count import visible

HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (4, 1)}
MASKS = {"causal": Mask(), "full": Mask(False), "window": Mask(window=9), "window full": Mask(False, 9)}
COMPUTE = StrategyOptions(grad_dtype="compute")


def plan_of(layout: str, world: int, packing=((37,),), mask: Mask = MASKS["causal"], length: int = 37) -> SequencePlan:
    documents = [Documents.from_lengths(row) for row in packing]
    return SequencePlan(documents, mask, LAYOUTS[layout], length, world)


def visits(plan: SequencePlan) -> np.ndarray:
    """``[P, P]``: of how many tokens rank i holds a query that sees a key of rank j, from the mask alone."""
    seen = [visible(tuple(docs.lengths.tolist()), plan.mask, plan.length) for docs in plan.documents]
    held = [plan.positions(rank) for rank in range(plan.world)]
    counts = np.zeros((plan.world, plan.world), dtype=int)
    for i, j in itertools.permutations(range(plan.world), 2):
        counts[i, j] = sum(any(row[q, held[j]].any() for row in seen) for q in held[i])
    return counts


def check_tree(plan: SequencePlan, heads: str, dtype: torch.dtype, options: StrategyOptions) -> None:
    found = measured("tree", plan, HEADS[heads], dtype, options=options)
    assert found == closed("tree", plan, HEADS[heads], dtype, options=options)
    (size, wide), batch, counts = BYTES[dtype], len(plan.documents), visits(plan)
    numbers = batch * HEADS[heads][0]
    for rank, volume in enumerate(found):
        leaving, returned = counts[rank].sum(), counts[:, rank].sum()
        assert volume.forward == numbers * (leaving * DIM * size + returned * (DIM + 1) * wide)
        gradient = size if options is COMPUTE else wide
        assert volume.backward == numbers * (leaving * (3 * DIM * size + wide) + returned * DIM * gradient)
        hosts, guests = (counts[rank] > 0).sum(), (counts[:, rank] > 0).sum()
        assert (volume.messages_forward, volume.messages_backward) == (hosts + 2 * guests, 4 * hosts + guests)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_tree_sends_what_sees_and_is_seen(layout, world):
    heads = tuple(HEADS)[world % 3]
    check_tree(plan_of(layout, world), heads, torch.bfloat16, (StrategyOptions(), COMPUTE)[world % 2])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tree_sends_less_where_documents_and_windows_hide(layout, mask):
    packing = ((18, 1, 1, 17), (5, 20))
    check_tree(plan_of(layout, 3, packing, MASKS[mask]), "gqa", torch.float32, StrategyOptions())


def test_without_a_mask_a_tree_rank_sends_every_other_rank_a_shard_and_returns_one():
    plan = plan_of("contiguous", 4, ((32,),), MASKS["full"], 32)
    shard = 8 * 2 * DIM
    assert {volume.forward for volume in measured("tree", plan, (2, 2), torch.bfloat16)} == {
        3 * (shard * 2 + (shard + 8 * 2) * 4)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "length"), [(1, 37), (2, 37), (3, 37), (4, 37), (8, 37), (4, 3), (8, 1)])
def test_rsa_sends_whole_shards_whatever_is_hidden(layout, world, length):
    heads, dtype = tuple(HEADS)[world % 3], (torch.bfloat16, torch.float64)[world % 2]
    plan = plan_of(layout, world, ((length,),), MASKS["causal"], length)
    found = measured("rsa", plan, HEADS[heads], dtype)
    assert found == closed("rsa", plan, HEADS[heads], dtype)
    (size, wide), kv_heads = BYTES[dtype], HEADS[heads][1]
    counts = [len(plan.positions(rank)) for rank in range(world)]
    for rank, volume in enumerate(found):
        passed = (length - counts[(rank + 1) % world]) * kv_heads * DIM
        returned = (length - counts[rank]) * kv_heads * DIM
        if world == 1:
            passed = returned = 0
        assert volume.forward == 2 * passed * size
        assert volume.backward == 3 * passed * size + 2 * returned * wide
