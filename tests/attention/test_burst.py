"""Burst: exact on either side and any grid, as many bytes as it says, and what hides behind what."""

import itertools

import pytest
import torch

from longctx.attention import AttentionCase, get_strategy, refusal
from longctx.attention.runtime.registry import inner_of
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.burst import side_of
from longctx.options import StrategyOptions
from longctx.sequence import Explicit, Mask, key_ring
from longctx.sim import Cluster
from tests.attention.travelling import HEADS, assert_no_order_matters, kernels, spans, traced
from tests.equivalence import attention_cases
from tests.equivalence.attention_cases import Case
from tests.equivalence.attention_rank import assert_exact, compute
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import BYTES, DIM, LAYOUTS, MASKS, PACKINGS, assert_volume, plan_of

GRIDS = ((4, 2), (8, 4), (8, 2), (2, 2), (3, 1), (4, 4), (8, 1), (1, 1), (3, 3), (2, 1))  # ranks, of which in a row
SIDES = ("q", "kv", "auto")
GRAD_DTYPES = ("fp32", "compute")


def check(layout, mask, heads, length, grid, side, grad_dtype, kernel="auto") -> None:
    world, inner = grid
    case = Case(layout, mask, heads, length, world)
    ranks = Cluster(world, trace=False).run(compute, case, "burst", kernel, inner, StrategyOptions(grad_dtype, side))
    for rank, computed in enumerate(ranks):
        assert_exact(case, rank, computed)


AXES = (
    GRIDS,
    attention_cases.MASKS,
    tuple(attention_cases.LAYOUTS),
    SIDES,
    GRAD_DTYPES,
    (31, 3, 1),
    ("gqa4", "mha", "mqa"),
)


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_sampled_cases_are_exact(case):
    grid, mask, layout, side, grad_dtype, length, heads = case
    check(layout, mask, heads, length, grid, side, grad_dtype)


@pytest.mark.matrix
@pytest.mark.parametrize("length", [31, 997, 3, 1])
@pytest.mark.parametrize("heads", attention_cases.HEADS)
@pytest.mark.parametrize("mask", attention_cases.MASKS)
def test_every_case_is_exact(mask, heads, length):
    for axes in itertools.product(attention_cases.LAYOUTS, GRIDS, SIDES[:2], GRAD_DTYPES):
        layout, grid, side, grad_dtype = axes
        check(layout, mask, heads, length, grid, side, grad_dtype)


def test_the_dense_kernel_is_exact_behind_a_travelling_delta():
    check("zigzag", "documents window causal", "gqa4", 31, (4, 2), "q", "fp32", "dense")


# --- bytes and messages ---


@pytest.mark.parametrize(
    ("layout", "packing", "mask", "heads", "grid", "side", "grad_dtype"),
    pairwise((tuple(LAYOUTS), tuple(PACKINGS), tuple(MASKS), tuple(HEADS), GRIDS, SIDES, GRAD_DTYPES)),
)
def test_the_closed_form_is_what_was_sent(layout, packing, mask, heads, grid, side, grad_dtype):
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], 96, grid[0])
    dtype = torch.bfloat16 if grad_dtype == "compute" else torch.float32
    assert_volume("burst", plan, HEADS[heads], dtype, grid[1], StrategyOptions(grad_dtype, side))


def test_an_explicit_layout_with_an_idle_rank():
    layout = Explicit((((0, 20), (50, 96)), (), ((20, 40),), ((40, 50),)))
    for inner, side in itertools.product((1, 2, 4), ("kv", "q")):
        plan = plan_of(PACKINGS["mixed"], MASKS["window full"], layout, 96, 4)
        assert_volume("burst", plan, (2, 1), torch.float32, inner, StrategyOptions(backward_rotates=side))


@pytest.mark.parametrize(("world", "inner"), [(2, 1), (4, 2), (8, 2), (8, 4), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_a_mask_it_costs_what_the_paper_says(world, inner, dtype):
    """Every rank sends P - 1 blocks of (K, V), or of (Q, dO, lse, delta), and as many of what comes home."""
    rows, (h, k), (e, w) = 6, (4, 2), BYTES[dtype]
    plan = plan_of([(rows * world,)], Mask(False), LAYOUTS["zigzag"], rows * world, world)
    for side, grad_dtype in itertools.product(("kv", "q"), GRAD_DTYPES):
        g = e if grad_dtype == "compute" else w
        row = 2 * k * DIM * (e + g) if side == "kv" else h * (2 * (DIM * e + w) + DIM * g)
        for one in assert_volume("burst", plan, (h, k), dtype, inner, StrategyOptions(grad_dtype, side)):
            assert one.forward == (world - 1) * rows * 2 * k * DIM * e
            assert one.backward == (world - 1) * rows * row
            assert one.messages_forward == world - 1
            assert one.messages_backward == (world - 1) * (2 if side == "kv" else 3)


def test_crossings_carry_each_block_once_to_each_row_of_ranks():
    world, inner, rows = 8, 4, 4
    plan = plan_of([(rows * world,)], Mask(False), LAYOUTS["striped"], rows * world, world)
    assert key_ring(plan, inner).cost == (world * (world // inner - 1) * rows, world * 2 * (inner - 1) * rows)


def sizes(h: int, k: int, dim: int = 128, grad_dtype: str = "fp32") -> Sizes:
    return Sizes(1, h, k, dim, 2, 4, 2, StrategyOptions(grad_dtype=grad_dtype))


def test_queries_travel_where_they_are_the_smaller_side():
    """Without masks: h (2 (2 D + 4) + 4 D) against 2 k D (2 + 4) in bf16 with fp32 accumulators, hence g < 1.5."""
    plan = plan_of([(64,)], Mask(False), LAYOUTS["striped"], 64, 4)
    assert [side_of(plan, sizes(h, k)) for h, k in ((32, 32), (32, 24), (32, 16), (32, 8), (8, 1))] == [
        "q", "q", "kv", "kv", "kv",
    ]  # fmt: skip
    # All bf16: h (2 (2 D + 4) + 2 D) against 8 k D, hence g < 4/3 and a little less.
    assert [side_of(plan, sizes(h, k, grad_dtype="compute")) for h, k in ((32, 32), (32, 26), (32, 24))] == [
        "q", "q", "kv",
    ]  # fmt: skip
    assert side_of(plan, sizes(32, 32, dim=2)) == "kv"  # a delta and an lse are as long as a query


@pytest.mark.parametrize(("cut", "heads", "side"), [(8, (8, 8), "kv"), (56, (8, 2), "q")])
def test_masks_and_layouts_may_turn_the_choice(cut, heads, side):
    """Causal, on two ranks: keys of the first rank are read, or queries of the second read them."""
    uneven = plan_of([(64,)], Mask(), Explicit((((0, cut),), ((cut, 64),))), 64, 2)
    assert side_of(uneven, sizes(*heads)) == side
    even = plan_of([(64,)], Mask(), LAYOUTS["contiguous"], 64, 2)
    assert side_of(even, sizes(*heads)) != side


# --- schedule ---


@pytest.mark.parametrize("side", ["kv", "q"])
def test_a_crossing_copy_is_under_way_for_a_whole_lap(side):
    world, inner = 6, 3
    plan = plan_of([(96,)], Mask(False), LAYOUTS["zigzag"], 96, world)
    for rank, events in enumerate(traced("burst", plan, (4, 2), inner, StrategyOptions(backward_rotates=side))):
        column = {rank % inner, rank % inner + inner}
        crossings = [span for span in spans(events) if set(span[2].ranks) == column]
        # Sent and received, forward and backward; queries travel as two tensors.
        assert len(crossings) == 2 * (1 + (2 if side == "q" else 1))
        for post, wait, event in crossings:
            hidden = [at for at in kernels(events) if post < at < wait]
            assert len(hidden) == inner, f"{event} is awaited after {len(hidden)} kernels of a lap of {inner}"


def test_gradients_ride_one_step_behind_and_what_comes_home_has_its_own_channel():
    world, inner = 4, 4
    plan = plan_of([(64,)], Mask(False), LAYOUTS["striped"], 64, world)
    for events in traced("burst", plan, (4, 2), inner, StrategyOptions(backward_rotates="q")):
        wide = [span for span in spans(events) if span[2].dtype == "float32" and span[2].shapes[0][0] == 1]
        passed_on = [span for span in wide if span[0] < kernels(events)[-1]]
        assert len(passed_on) == 2 * (world - 2)
        for post, wait, _ in passed_on:
            assert sum(post < at < wait for at in kernels(events, "backward")) == 1
        home = [event.group for post, _, event in wide if post > kernels(events)[-1]]
        assert len(home) == 2 and not set(home) & {event.group for _, _, event in passed_on}


def test_a_lap_s_gradients_come_home_while_the_next_lap_computes():
    world, inner = 6, 3
    plan = plan_of([(96,)], Mask(False), LAYOUTS["striped"], 96, world)
    for events in traced("burst", plan, (4, 4), inner, StrategyOptions(backward_rotates="q")):
        backward = kernels(events, "backward")
        home = [
            (post, wait)
            for post, wait, event in spans(events)
            if event.dtype == "float32" and event.shapes[0][0] == 1 and event.operation == "recv"
        ]
        [(post, wait)] = [span for span in home if backward[inner - 1] < span[0] < backward[inner]]
        assert sum(post < at < wait for at in backward) == inner


@pytest.mark.parametrize(("world", "inner"), [(4, 2), (8, 4), (4, 1), (3, 3)])
def test_no_order_of_hand_overs_changes_a_bit(world, inner):
    plan = plan_of([(20, 1, 40)], Mask(window=30), LAYOUTS["zigzag"], 67, world)
    for side, grad_dtype in itertools.product(("kv", "q"), GRAD_DTYPES):
        assert_no_order_matters("burst", plan, inner, StrategyOptions(grad_dtype, side))


# --- what it declares ---


def test_it_takes_every_case_and_its_choices():
    burst = get_strategy("burst")

    def asked(**changes) -> AttentionCase:
        fields = {"world": 8, "heads": 8, "kv_heads": 2, "layout": "zigzag", "mask": Mask()}
        return AttentionCase(**{**fields, **changes})

    assert refusal(burst, asked(options=StrategyOptions("compute", "q", inner_ring=4))) is None
    assert "attention.inner_ring=3" in refusal(burst, asked(options=StrategyOptions(inner_ring=3)))
    assert "nearest valid: 2" in refusal(burst, asked(options=StrategyOptions(inner_ring=3)))
    assert "valid: auto, kv, q" in refusal(burst, asked(options=StrategyOptions(backward_rotates="values")))
    assert (inner_of(burst, asked()), inner_of(burst, asked(options=StrategyOptions(inner_ring=2)))) == (8, 2)
