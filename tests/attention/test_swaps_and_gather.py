"""Ulysses, USP and gather: exact with any heads, as many bytes as they say, and what is in flight when."""

import itertools

import pytest
import torch

from longctx.attention import AttentionCase, StrategyAttention, get_strategy, refusal
from longctx.attention.runtime.head_sharding import HeadSplit
from longctx.attention.runtime.registry import inner_of
from longctx.errors import ConfigError
from longctx.options import StrategyOptions
from longctx.sequence import Explicit, Mask
from longctx.sim import Cluster
from longctx.verify import VerifyCase, judge, run_rank
from tests.attention.travelling import assert_no_order_matters, spans, traced
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import BYTES, DIM, LAYOUTS, MASKS, PACKINGS, assert_volume, plan_of, with_row

# Query and key/value heads: fewer of the latter than ranks, and shares of ranks that do not fall on their edges.
HEADS = ((8, 8), (8, 2), (24, 8), (24, 3), (6, 3), (12, 4), (6, 1))
GRIDS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8))  # ranks, of which in a row
LENGTHS = (1, 5, 31, 64)
STRATEGIES = ("ulysses", "usp", "gather")


def degree(ranks: int) -> StrategyOptions:
    return StrategyOptions(ulysses_degree=ranks)


def group(world: int):
    return None if world == 1 else torch.distributed.group.WORLD


def options(strategy: str, grid: tuple[int, int], grad_dtype: str) -> StrategyOptions:
    taken = get_strategy(strategy).options
    return with_row(strategy, grid[1], StrategyOptions(grad_dtype if "grad_dtype" in taken else "fp32"))


def case_of(strategy, layout, mask, heads, length, grid, grad_dtype) -> VerifyCase:
    documents = () if length < 5 or mask.endswith("one") else (length // 2 - 1, 1, length - length // 2)
    window = max(1, length // 4) if "window" in mask else None
    return VerifyCase(
        strategy, layout, grid[0], seq=length, documents=documents, heads=heads[0], kv_heads=heads[1], head_dim=4,
        window=window, causal="full" not in mask, batch=2, options=options(strategy, grid, grad_dtype),
    )  # fmt: skip


def check(case: VerifyCase) -> None:
    if case.refused():
        assert case.heads % (case.options.ulysses_degree or case.world), case.refused()
        return
    ranks = Cluster(case.world, trace=False).run(run_on_world, case)
    verdict, _ = judge(case, ranks)
    assert verdict.passed, (case, verdict.errors)


def run_on_world(case: VerifyCase):
    return run_rank(case, torch.distributed.group.WORLD)


AXES = (
    STRATEGIES,
    ("contiguous", "zigzag", "striped"),
    ("causal", "full", "window", "window full one", "causal one"),
    HEADS,
    LENGTHS,
    GRIDS,
    ("fp32", "compute"),
)


@pytest.mark.parametrize("axes", pairwise(AXES), ids=str)
def test_sampled_cases_are_exact(axes):
    check(case_of(*axes))


@pytest.mark.matrix
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_case_is_exact(strategy, heads):
    for layout, mask, length, grid in itertools.product(*AXES[1:3], (*LENGTHS, 997), GRIDS):
        check(case_of(strategy, layout, mask, heads, length, grid, "fp32"))


@pytest.mark.parametrize(
    ("strategy", "layout", "packing", "mask", "heads", "grid", "grad_dtype"),
    pairwise((STRATEGIES, tuple(LAYOUTS), tuple(PACKINGS), tuple(MASKS), HEADS, GRIDS, ("fp32", "compute"))),
)
def test_the_closed_form_is_what_was_sent(strategy, layout, packing, mask, heads, grid, grad_dtype):
    world = grid[0]
    chosen = options(strategy, grid, grad_dtype)
    case = AttentionCase(world, *heads, "zigzag", MASKS[mask], chosen)
    if refusal(get_strategy(strategy), case):
        return
    inner = inner_of(get_strategy(strategy), case)
    plan = plan_of(PACKINGS[packing], MASKS[mask], LAYOUTS[layout], 96, world)
    dtype = torch.bfloat16 if grad_dtype == "compute" else torch.float32
    assert_volume(strategy, plan, heads, dtype, inner, case.options)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_without_a_mask_they_cost_what_the_papers_say(world):
    """Ulysses (P - 1) / P of q, k, v and out; gather P - 1 shards of k and v, as many of dk and dv."""
    rows, (h, k), (e, w) = 6, (16, 8), BYTES[torch.bfloat16]
    plan = plan_of([(rows * world,)], Mask(False), LAYOUTS["zigzag"], rows * world, world)
    for one in assert_volume("ulysses", plan, (h, k), torch.bfloat16, world):
        assert one.forward == one.backward == (2 * h + 2 * k) * rows * DIM * e * (world - 1) // world
    for one in assert_volume("gather", plan, (h, k), torch.bfloat16):
        assert one.forward == (world - 1) * rows * 2 * k * DIM * e
        assert one.backward == (world - 1) * rows * 2 * k * DIM * (e + w)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_explicit_layout_with_an_idle_rank(strategy):
    layout = Explicit((((0, 20), (50, 96)), (), ((20, 40),), ((40, 50),)))
    plan = plan_of(PACKINGS["mixed"], MASKS["window"], layout, 96, 4)
    assert_volume(strategy, plan, (4, 2), torch.float32, {"ulysses": 4, "usp": 2, "gather": 1}[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_order_of_hand_overs_matters(strategy):
    plan = plan_of(PACKINGS["mixed"], MASKS["causal"], LAYOUTS["zigzag"], 96, 4)
    assert_no_order_matters(strategy, plan, {"ulysses": 4, "usp": 2, "gather": 1}[strategy])


@pytest.mark.parametrize(("heads", "groups"), [((8, 8), 2), ((8, 4), 1)])
def test_all_that_a_swap_sends_is_in_flight_at_once(heads, groups):
    """Four swaps of each group of heads, three messages each way; they do not wait for one another."""
    plan = plan_of([(64,)], Mask(False), LAYOUTS["zigzag"], 64, 4)
    for events in traced("ulysses", plan, heads, 4):
        found = sorted(spans(events))
        assert len(found) == groups * 4 * 2 * 3
        for first in range(0, len(found), 6):
            together = found[first : first + 6]
            assert max(post for post, _, _ in together) < min(wait for _, wait, _ in together)


def test_heads_are_shared_and_copied_only_where_they_must_be():
    assert [HeadSplit(8, 2, 4).key_heads(rank) for rank in range(4)] == [slice(0, 1)] * 2 + [slice(1, 2)] * 2
    assert [HeadSplit(8, 8, 2).copies(rank) for rank in range(2)] == [None, None]
    split = HeadSplit(6, 3, 2)  # heads 0, 0, 1 and 1, 2, 2
    assert [split.copies(rank) for rank in range(2)] == [[0, 0, 1], [0, 1, 1]]
    assert [split.local_keys(rank) for rank in range(2)] == [3, 3]


@pytest.mark.parametrize(
    ("strategy", "changes", "words"),
    [
        (
            "ulysses",
            {"world": 4, "heads": 6},
            ["4 ranks", "6 query heads", "parallel.sp=3", "attention.ulysses_degree=2", "attention=gather"],
        ),
        (
            "usp",
            {"options": degree(4), "heads": 6},
            ["ulysses_degree=4", "6 query heads", "ulysses_degree=2"],
        ),
        ("usp", {"options": degree(5), "heads": 6}, ["ulysses_degree=5 must divide the 8 ranks", "nearest valid: 2"]),
        ("usp", {"options": degree(3)}, ["attention.ulysses_degree=3 must divide the 8 ranks", "nearest valid: 2"]),
        ("ulysses", {"options": degree(2)}, ["attention.ulysses_degree=2: it has no such choice"]),
        (
            "gather",
            {"options": StrategyOptions(backward_rotates="kv")},
            ["attention.backward_rotates=kv: it has"],
        ),
        (
            "ulysses",
            {"options": StrategyOptions(grad_dtype="compute")},
            ["attention.grad_dtype=compute: it has"],
        ),
        (
            "gather",
            {"options": StrategyOptions(grad_dtype="thin")},
            ["attention.grad_dtype=thin is not known; valid: fp32, compute"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_choice(strategy, changes, words):
    fields = {"world": 8, "heads": 8, "kv_heads": 1, "layout": "zigzag", "mask": Mask(), **changes}
    reason = refusal(get_strategy(strategy), AttentionCase(**fields))
    assert reason is not None
    for word in words:
        assert word in reason


def test_a_library_user_is_told_of_rows_that_do_not_fit():
    def body():
        with pytest.raises(ConfigError, match="takes divisors of 4"):
            StrategyAttention("usp", torch.distributed.group.WORLD, options=degree(3))
        with pytest.raises(ConfigError, match="has no such choice"):
            StrategyAttention("gather", torch.distributed.group.WORLD, options=degree(2))

    Cluster(4).run(body)


def test_local_attention_does_not_take_a_shared_sequence_for_a_whole_one():
    plan = plan_of([(64,)], Mask(), LAYOUTS["contiguous"], 64, 2)

    def body():
        q = torch.zeros(1, plan.shard, 2, 4)
        with pytest.raises(ConfigError, match="2 ranks share this one"):
            StrategyAttention("local", torch.distributed.group.WORLD)(q, q, q, plan.handle)

    Cluster(2).run(body)


@pytest.mark.parametrize("strategy", ["ulysses", "usp", "gather"])
def test_opcheck(strategy):
    plan = plan_of([(20, 11)], Mask(), LAYOUTS["zigzag"], 31, 1)
    q, k, v = (torch.randn(1, 31, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    attention = StrategyAttention(strategy)
    operator = getattr(torch.ops.longctx, strategy).default
    kv_heads = () if strategy == "gather" else (2,)
    torch.library.opcheck(operator, (q, k, v, plan.handle, attention._group, "auto", 0.4, "", *kv_heads))


@pytest.mark.parametrize(
    ("strategy", "heads", "words"),
    [
        ("ulysses", (3, 3), "3 query heads must divide by the 2"),
        ("ring", (3, 2), "3 query heads must be a multiple of the 2"),
        ("usp", (3, 3), "must divide by"),
    ],
)
def test_a_library_user_is_told_of_heads_that_do_not_divide(strategy, heads, words):
    plan = plan_of([(64,)], Mask(), LAYOUTS["contiguous"], 64, 2)

    def body():
        q, k = (torch.zeros(1, plan.shard, n, 4) for n in heads)
        attention = StrategyAttention(strategy, torch.distributed.group.WORLD, options=with_row(strategy, 2))
        with pytest.raises(ConfigError, match=words):
            attention(q, k, k, plan.handle)

    Cluster(2).run(body)


def test_a_library_user_is_told_of_options_that_nobody_reads():
    for strategy, options in (
        ("ring", StrategyOptions(backward_rotates="q")),
        ("gather", StrategyOptions(grad_dtype="thin")),
    ):
        with pytest.raises(ConfigError, match=f"attention.strategy={strategy} refuses: attention"):
            StrategyAttention(strategy, options=options)
