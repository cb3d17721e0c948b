"""What the ring sends: the ledger of sim, the strategy's closed form and an independent count agree."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings

from longctx.attention.costs.estimate import Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.options import StrategyOptions
from longctx.sequence import Contiguous, Explicit, Mask, SequencePlan, key_ring
from longctx.sim import Cluster
from tests.equivalence.pairwise import pairwise
from tests.sequence.brute_force import examples
from tests.volume.measure import BYTES, DIM, FORWARD, LAYOUTS, assert_volume, closed, costs, measured, plan_of
from tests.volume.ring_count import count


def measured_by_pass(plan: SequencePlan, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Bytes by rank in forward and in backward; none goes another way than the ring's."""
    cluster = Cluster(plan.world)
    found = measured("ring", plan, (heads, kv_heads), dtype, cluster=cluster)
    turn = key_ring(plan).direction
    forward = [
        (rank, event.peers[0])
        for rank, events in enumerate(cluster.trace)
        for event in events
        if (event.phase, event.operation, event.step) == ("post", "send", FORWARD)
    ]
    assert set(forward) <= {(rank, (rank + turn) % plan.world) for rank in range(plan.world)}
    return [one.forward for one in found], [one.backward for one in found]


def check(plan: SequencePlan, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    forward, backward = measured_by_pass(plan, heads, kv_heads, dtype)
    rows, (size, gradient_size) = count(plan), BYTES[dtype]
    numbers = len(plan.documents) * kv_heads * DIM
    assert forward == [2 * keys * numbers * size for keys in rows.keys]
    assert backward == [
        2 * (keys * size + gradients * gradient_size) * numbers
        for keys, gradients in zip(rows.keys, rows.gradients, strict=True)
    ]
    volumes = closed("ring", plan, (heads, kv_heads), dtype)
    assert (forward, backward) == ([one.forward for one in volumes], [one.backward for one in volumes])


def by_rank(layout: str, world: int) -> tuple[list[Fraction], list[Fraction]]:
    """Shards of keys and values that a rank passes on, and of dk and dv that it sends, by theory.

    Striped: everyone reads everything, so each of P blocks makes P - 1 hops. Contiguous: rank r reads the
    blocks of ranks up to r, so block o goes from o up to P - 1 and never wraps: rank r < P - 1 passes on
    blocks 0..r, and holds 0..r-1 of others. Zigzag: ranks below o read all of block o, ranks above it only
    its early half; so it goes down, whole as far as rank 0, and by half from rank P - 1 to o + 1.
    """
    ranks = range(world)
    if layout == "striped":
        return [Fraction(world - 1)] * world, [Fraction(world - 1)] * world
    if layout == "contiguous":
        return [Fraction((r + 1) % world) for r in ranks], [Fraction(r) for r in ranks]
    passed = [world - r + Fraction(r - 1, 2) if r else Fraction(world - 1, 2) for r in ranks]
    return passed, [world - 1 - r + Fraction(r, 2) for r in ranks]


@pytest.mark.parametrize(
    ("layout", "share"), [("striped", 1), ("zigzag", Fraction(3, 4)), ("contiguous", Fraction(1, 2))]
)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(2, 2, torch.float32), (8, 2, torch.float64), (4, 1, torch.bfloat16)]
)
def test_one_causal_document_costs_what_the_paper_says(layout, share, world, heads, kv_heads, dtype):
    shard = 8
    plan = plan_of([(shard * world,)], Mask(), LAYOUTS[layout], shard * world, world)
    forward, backward = measured_by_pass(plan, heads, kv_heads, dtype)
    size, gradient_size = BYTES[dtype]
    keys, gradients = (2 * shard * kv_heads * DIM * one for one in (size, gradient_size))
    passed, returned = by_rank(layout, world)
    assert sum(passed) == sum(returned) == share * world * (world - 1)
    assert forward == [keys * shards for shards in passed]
    assert backward == [keys * p + gradients * r for p, r in zip(passed, returned, strict=True)]
    check(plan, heads, kv_heads, dtype)


PACKINGS = {
    "one": [(192,)],
    "edges": [(48, 48, 96)],
    "mixed": [(95, 1, 1, 60, 35), (1,) * 40 + (100,)],
    "padded": [(20, 70), (), (130, 3)],
}
MASKS = {"causal": Mask(), "full": Mask(False), "window": Mask(window=30), "window full": Mask(False, 30)}


@pytest.mark.parametrize(
    ("layout", "packing", "mask", "world"),
    [(*axes, (3, 8)[i % 2]) for i, axes in enumerate(pairwise((tuple(LAYOUTS), tuple(PACKINGS), tuple(MASKS))))]
    + [("zigzag", "mixed", "window", 2), ("striped", "mixed", "causal", 4), ("contiguous", "mixed", "full", 4)],
)
def test_documents_and_windows_cost_what_is_read(layout, packing, mask, world):
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], 192, world)
    check(plan, 4, 1, torch.float32)
    check(plan, 4, 2, torch.bfloat16)


def test_an_explicit_layout_with_an_idle_rank():
    layout = Explicit((((0, 40), (100, 192)), (), ((40, 100),)))
    for mask in MASKS.values():
        check(plan_of(PACKINGS["mixed"], mask, layout, 192, 3), 2, 1, torch.float32)


@settings(max_examples=200)
@given(examples())
def test_closed_form_is_the_independent_count(example):
    plan = example.plan()
    rows, volume = count(plan), costs("ring").volume
    for rank in range(example.world):
        one = volume(plan, rank, Sizes(1, 1, 1, 1, 10, 1000))
        assert one.forward == 2 * 10 * rows.keys[rank]
        assert one.backward == 2 * (10 * rows.keys[rank] + 1000 * rows.gradients[rank])


@settings(max_examples=60)
@given(examples(longest=300, rows=2))
def test_long_blocks_are_narrowed_by_the_documented_rule(example):
    plan = example.plan()
    assert [key_ring(plan).rows_sent(rank) for rank in range(example.world)] == count(plan).keys


def test_documents_that_end_on_shard_edges_send_nothing():
    plan = plan_of([(48, 48, 48, 48)], Mask(False), Contiguous(), 192, 4)
    assert measured_by_pass(plan, 2, 2, torch.float32) == ([0] * 4, [0] * 4)


def test_a_window_costs_its_own_width_under_the_contiguous_layout():
    """Each block goes one hop and carries the window - 1 last rows; with no future, not even that for the last."""
    plan = plan_of([(192,)], Mask(window=9), Contiguous(), 192, 4)
    forward, _ = measured_by_pass(plan, 2, 2, torch.float32)
    assert forward == [2 * 8 * 2 * DIM * 4] * 3 + [0]


def test_local_attention_sends_nothing():
    plan = plan_of([(9,)], Mask(), Contiguous(), 9, 1)
    assert costs("local").volume(plan, 0, Sizes(1, 1, 1, 1, 8, 8)) == Volume(0, 0, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grad_dtype", ["fp32", "compute"])
def test_bytes_and_messages_of_either_way_home_are_the_closed_form(layout, mask, grad_dtype):
    plan = plan_of(PACKINGS["mixed"], MASKS[mask], LAYOUTS[layout], 192, 4)
    assert_volume("ring", plan, (4, 2), torch.bfloat16, options=StrategyOptions(grad_dtype=grad_dtype))
