"""TokenRing: exact in both passes, as many bytes as it says, both directions of the links in use at once."""

import pytest
import torch

from longctx.options import StrategyOptions
from longctx.sequence import Explicit, Mask, query_ring
from longctx.sim import Cluster, Event
from tests.attention.travelling import HEADS, assert_no_order_matters, spans, traced
from tests.equivalence import attention_cases
from tests.equivalence.attention_cases import Case
from tests.equivalence.attention_rank import assert_exact, compute
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import BYTES, DIM, LAYOUTS, MASKS, PACKINGS, assert_volume, plan_of

WORLDS = (3, 4, 2, 8, 1)
GRAD_DTYPES = ("fp32", "compute")


def check(case: Case, grad_dtype: str, kernel: str = "auto") -> None:
    ranks = Cluster(case.world, trace=False).run(
        compute, case, "token_ring", kernel, 1, StrategyOptions(grad_dtype=grad_dtype)
    )
    for rank, computed in enumerate(ranks):
        assert_exact(case, rank, computed)


AXES = (tuple(attention_cases.LAYOUTS), attention_cases.MASKS, ("gqa4", "mha", "mqa"), (31, 3, 1), WORLDS, GRAD_DTYPES)


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_sampled_cases_are_exact(case):
    *fields, grad_dtype = case
    check(Case(*fields), grad_dtype)


@pytest.mark.matrix
@pytest.mark.parametrize("case", list(attention_cases.all_cases()), ids=str)
def test_every_case_is_exact(case):
    check(case, "fp32")


def test_the_dense_kernel_is_exact_behind_it():
    check(Case("zigzag", "documents window causal", "gqa4", 31, 4), "fp32", "dense")


@pytest.mark.parametrize(
    ("layout", "packing", "mask", "heads", "world", "grad_dtype"),
    pairwise((tuple(LAYOUTS), tuple(PACKINGS), tuple(MASKS), tuple(HEADS), WORLDS, GRAD_DTYPES)),
)
def test_the_closed_form_is_what_was_sent(layout, packing, mask, heads, world, grad_dtype):
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], 96, world)
    dtype = torch.bfloat16 if grad_dtype == "compute" else torch.float32
    assert_volume("token_ring", plan, HEADS[heads], dtype, options=StrategyOptions(grad_dtype=grad_dtype))


def test_an_explicit_layout_with_an_idle_rank():
    layout = Explicit((((0, 20), (50, 96)), (), ((20, 50),)))
    for mask in MASKS.values():
        assert_volume("token_ring", plan_of(PACKINGS["mixed"], mask, layout, 96, 3), (2, 1), torch.float32)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_a_mask_it_costs_what_the_paper_says(world, dtype):
    """P - 1 times Q one way and (O, lse) the other; narrow, h (2 D e + w) a row, as TokenRing's 16-bit outputs."""
    rows, h, (e, w) = 6, 4, BYTES[dtype]
    plan = plan_of([(rows * world,)], Mask(False), LAYOUTS["zigzag"], rows * world, world)
    for grad_dtype in GRAD_DTYPES:
        back = e if grad_dtype == "compute" else w
        for one in assert_volume("token_ring", plan, (h, 2), dtype, options=StrategyOptions(grad_dtype=grad_dtype)):
            assert one.forward == (world - 1) * rows * h * (DIM * (e + back) + w)
            assert one.backward == (world - 1) * rows * h * (2 * (DIM * e + w) + DIM * back)
            assert (one.messages_forward, one.messages_backward) == ((world - 1) * 3, (world - 1) * 3)


@pytest.mark.parametrize("world", [4, 8])
def test_causal_zigzag_sends_three_quarters(world):
    rows = 8
    sent = {}
    for causal in (True, False):
        plan = plan_of([(rows * world,)], Mask(causal), LAYOUTS["zigzag"], rows * world, world)
        volumes = assert_volume("token_ring", plan, (2, 1), torch.float32)
        sent[causal] = sum(one.forward for one in volumes), sum(one.backward for one in volumes)
    assert [4 * part for part in sent[True]] == [3 * whole for whole in sent[False]]


def returns(event: Event) -> bool:
    """An output, its lse or a dq on the way home; what travels is in bfloat16, or of two tensors."""
    return event.dtype == "float32" and event.shapes[0][0] == 1


def test_queries_and_returns_go_opposite_ways_on_channels_of_their_own():
    world = 4
    plan = plan_of([(64,)], Mask(False), LAYOUTS["striped"], 64, world)
    turn = query_ring(plan).direction
    for rank, events in enumerate(traced("token_ring", plan, (4, 2))):
        messages = [event for _, _, event in spans(events)]
        channels = [{event.group for event in messages if returns(event) is home} for home in (True, False)]
        assert len(channels[0]) == len(channels[1]) == 1 and channels[0] != channels[1]
        sent = [event.peers[0] for event in messages if event.operation == "send" and returns(event)]
        home = [(rank - turn * hop) % world for hop in range(1, world)]
        assert sent == [peer for peer in home for _ in ("out", "lse")] + home
        travelling = [event for event in messages if event.operation == "send" and not returns(event)]
        assert {event.peers for event in travelling} == {((rank + turn) % world,)}


def test_no_order_of_hand_overs_changes_a_bit():
    for layout in LAYOUTS.values():
        plan = plan_of([(20, 1, 40)], Mask(window=30), layout, 67, 4)
        for grad_dtype in GRAD_DTYPES:
            assert_no_order_matters("token_ring", plan, options=StrategyOptions(grad_dtype=grad_dtype))
