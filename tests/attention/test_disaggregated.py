"""Core-attention disaggregation: any legal assignment of tasks to servers gives the same numbers."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.assignment import home_of, mask_of
from longctx.attention.strategies.disaggregated.ping_pong import PingPongAttention
from longctx.attention.strategies.disaggregated.prepared import assign, dispatches
from longctx.catalog import KERNELS
from longctx.comm import group_of
from longctx.errors import ConfigError
from longctx.options import StrategyOptions
from longctx.planner import PLANNERS, AttentionShape, Plan, PlannerOptions, Topology, make_plan
from longctx.sequence import SequencePlan
from longctx.sim import Cluster, Event, RankFailed, mark_step
from longctx.verify import VerifyCase
from longctx.verify.run import judge, run_rank
from tests.attention import marking_kernel
from tests.attention.cuts import Homes, plan_of, random_plan
from tests.attention.travelling import spans
from tests.volume.measure import BACKWARD, FORWARD, costs


def plan_at_random(case: VerifyCase, seed: int, groups: int = 1) -> Plan:
    return random_plan(Homes.of(case.plan()), seed, groups)


def check(case: VerifyCase, forward=None, backward=None):
    """Without plans: the planner's."""
    plan = case.plan()
    if forward is not None:
        assign(plan, forward, backward)
    results = Cluster(case.world).run(lambda: run_rank(case, dist.group.WORLD))
    verdict, _ = judge(case, results)
    assert verdict.passed, verdict.errors
    sizes = Sizes(case.batch, case.heads, case.kv_heads, case.head_dim, 8, 8, options=case.options)
    for rank in range(case.world):
        volume = costs(case.strategy).volume(plan, rank, sizes)
        sent = verdict.bytes_forward[rank], verdict.bytes_backward[rank]
        assert sent == (volume.forward, volume.backward)
    return plan


def case_of(world, lengths, strategy="disaggregated", grad_dtype="fp32", **options):
    return VerifyCase(
        strategy, options.pop("layout", "contiguous"), world, seq=sum(lengths), documents=tuple(lengths),
        head_dim=4, heads=2, kv_heads=1, options=StrategyOptions(grad_dtype), **options,
    )  # fmt: skip


partitions = given(
    st.lists(st.integers(1, 23), min_size=1, max_size=7),
    st.integers(1, 5),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.integers(0, 2**16),
)


def check_partition(lengths, world, layout, seed):
    case = case_of(world, lengths, layout=layout, seed=seed)
    check(case, plan_at_random(case, seed), plan_at_random(case, seed + 1))


@settings(max_examples=30)
@partitions
def test_any_partition_is_exact(lengths, world, layout, seed):
    check_partition(lengths, world, layout, seed)


@pytest.mark.matrix
@settings(max_examples=100)
@partitions
def test_any_of_a_hundred_partitions_is_exact(lengths, world, layout, seed):
    check_partition(lengths, world, layout, seed)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mask", [{}, {"window": 5}, {"causal": False}, {"causal": False, "window": 4}], ids=str)
def test_every_mask_two_batch_rows_and_different_passes(world, mask):
    case = case_of(world, [17, 1, 1, 30, 8], batch=2, **mask)
    check(case, plan_at_random(case, world), plan_at_random(case, world + 99))


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 17), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.sampled_from([(4, 2, 2), (4, 4, 4), (6, 3, 3), (6, 2, 2)]),
    st.integers(0, 2**16),
)
def test_heads_groups_may_be_cut_and_served_apart(lengths, world, layout, heads, seed):
    """Also in two batch rows, and with other groups backward."""
    heads, kv_heads, groups = heads
    case = VerifyCase(
        "disaggregated", layout, world, seq=sum(lengths), documents=tuple(lengths), head_dim=4, heads=heads,
        kv_heads=kv_heads, batch=2, seed=seed,
    )  # fmt: skip
    check(case, plan_at_random(case, seed, groups), plan_at_random(case, seed + 9))
    check(case, plan_at_random(case, seed), plan_at_random(case, seed + 9, groups))


def test_heads_groups_that_do_not_divide_are_refused():
    case = case_of(2, [12])
    with pytest.raises(RankFailed, match=r"3 heads groups cannot be served with 2 heads .* such as 1"):
        check(case, plan_at_random(case, 0, groups=3))


def test_plans_that_are_not_of_the_batch_are_refused():
    """Before anything is computed: they would be silently wrong."""
    plan = case_of(2, [12, 5]).plan()
    homes = Homes.of(plan)
    pieces = [(0, 0, 12, 0, 12, 1), (1, 0, 5, 0, 5, 0)]
    legal = plan_of(homes, pieces)
    assign(plan, legal)
    for other, why in (
        (plan_of(homes, pieces[:1]), "not legal: document 1: tasks have other cells"),
        (plan_of(homes, [*pieces, (1, 2, 3, 0, 1, 1)]), "document 1: tasks have other"),
        (
            plan_of(Homes.of(case_of(2, [5, 12]).plan()), [(0, 0, 5, 0, 5, 1), (1, 0, 12, 0, 12, 0)]),
            "not where the batch",
        ),
        (plan_of(Homes.of(case_of(3, [12, 5]).plan()), pieces), "17 tokens on 3 ranks"),
        (plan_of(Homes.of(case_of(2, [12, 5], window=3).plan()), pieces), "mask is not the batch's"),
    ):
        with pytest.raises(ConfigError, match=why):
            assign(plan, other)
        with pytest.raises(ConfigError, match=why):
            assign(plan, legal, other)


def test_shares_may_go_home_in_the_inputs_dtype():
    case = case_of(4, [40, 9, 1], grad_dtype="compute")
    check(case, plan_at_random(case, 3), plan_at_random(case, 4))


def test_one_server_for_all_and_servers_without_work():
    case = case_of(4, [19, 12])
    plan = check(case, plan_of(Homes.of(case.plan()), [(0, 0, 19, 0, 19, 2), (1, 0, 12, 0, 12, 2)]))
    there, _ = dispatches(plan, "cad", AttentionShape())
    assert [there.cells(rank) for rank in range(4)] == [0, 0, 19 * 20 // 2 + 12 * 13 // 2, 0]


def at_home(plan):
    """Every query of the one document is served where it is."""
    rows = [(plan.positions(rank)[[0, -1]] + [0, 1]).tolist() for rank in range(plan.world)]
    return plan_of(Homes.of(plan), [(0, *row, 0, plan.length, rank) for rank, row in enumerate(rows)])


def test_served_at_home_only_keys_travel():
    case = case_of(3, [30])
    plan = check(case, at_home(case.plan()))
    sizes = Sizes(1, 2, 1, 4, 8, 8)
    volumes = [costs("disaggregated").volume(plan, rank, sizes) for rank in range(3)]
    # Ten tokens a rank; the keys of rank 0 go to both others, those of rank 1 to the last, and nothing comes home.
    assert [volume.forward for volume in volumes] == [2 * 20 * sizes.keys, 2 * 10 * sizes.keys, 0]


def test_a_token_crosses_once_however_many_tasks_read_it():
    case = case_of(2, [16])
    pieces = [(0, q, q + 2, k, k + 4, 1) for q in range(0, 16, 2) for k in range(0, 16, 4)]
    plan = check(case, plan_of(Homes.of(case.plan()), pieces))
    volume = costs("disaggregated").volume(plan, 0, Sizes(1, 2, 1, 4, 8, 8))
    sizes = Sizes(1, 2, 1, 4, 8, 8)
    assert volume.forward == 8 * (sizes.queries + 2 * sizes.keys)


@pytest.mark.parametrize("strategy", ["disaggregated", "zeppelin"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mask", [{}, {"window": 5}, {"causal": False}, {"causal": False, "window": 4}], ids=str)
def test_what_planners_assign_is_exact(strategy, world, mask):
    for layout in ("contiguous", "zigzag", "striped"):
        check(case_of(world, [151, 1, 1, 40, 9], strategy, layout=layout, batch=2, **mask))
        check(case_of(world, [3], strategy, layout=layout, **mask))


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_one_executor_runs_what_any_planner_makes(name, layout):
    """An all-gather among them, whose ranks are sent keys that they do not read."""
    for world, mask in ((1, {}), (3, {"window": 6}), (4, {"batch": 2})):
        case = case_of(world, [61, 1, 1, 40, 9], layout=layout, **mask)
        batch = case.plan()
        made = make_plan(
            name, mask_of(batch), Topology(world, per_node=2), PlannerOptions(block=4, chunk=8), home_of(batch)
        )
        check(case, made)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 5))
def test_any_packing_is_planned_exactly(lengths, world):
    check(case_of(world, lengths))


def test_a_long_document_among_short_ones_is_balanced():
    """One document on two of eight ranks, a hundred on the others; 64 rows of it are up to 0.46 of the mean."""
    case = case_of(8, [2048, *[64] * 96])
    plan = case.plan()
    there, _ = dispatches(plan, "cad", AttentionShape(2, 1, 4, 8))
    cells = [there.cells(rank) for rank in range(8)]
    assert sum(cells) == sum(plan.work(rank) for rank in range(8))
    assert plan.balance() > 5 and max(cells) * 8 <= 1.15 * sum(cells)


@pytest.fixture
def marking(monkeypatch):
    monkeypatch.setitem(KERNELS, "marking", f"{marking_kernel.__name__}:Marking")


def hidden_behind(events: list[Event], step: int) -> list[list[int]]:
    """Of every message that is sent in a pass, which calls of the kernel lie between its post and its wait."""
    mark = {FORWARD: marking_kernel.FORWARD, BACKWARD: marking_kernel.BACKWARD}[step]
    calls = [place for place, event in enumerate(events) if (event.operation, event.step) == (mark, step)]
    return [
        [number for number, at in enumerate(calls) if post < at < wait]
        for post, wait, event in spans(events)
        if event.step == step and event.operation == "send"
    ]


def run_in_turn(plans: list[SequencePlan]) -> None:
    """Two nano-batches; each serves with two calls of the kernel, what is all its own and what has arrived."""
    attention = PingPongAttention(group_of(dist.group.WORLD), "marking")
    inputs = [[torch.randn(1, plans[0].shard, n, 4).double().requires_grad_() for n in (2, 1, 1)] for _ in plans]
    mark_step(FORWARD)
    runs = [attention.start(*q, plan.handle) for q, plan in zip(inputs, plans, strict=True)]
    runs = [attention.serve(run) for run in runs]
    total = sum(attention.finish(run).square().sum() for run in runs)
    mark_step(BACKWARD)
    total.backward()


@pytest.mark.parametrize("step", [FORWARD, BACKWARD])
def test_in_turn_only_the_last_results_on_their_way_home_are_exposed(marking, step):
    plans = [case_of(2, [40]).plan() for _ in range(2)]
    cluster = Cluster(2, trace_compute=True)
    cluster.run(run_in_turn, plans)
    for events in cluster.trace:
        found = hidden_behind(events, step)
        assert len(found) > 4
        # Tokens of both leave before anything is computed; what the first found goes home while the second computes.
        assert {min(behind) for behind in found if behind} <= {0, 2}
        exposed = [number for number, behind in enumerate(found) if not behind]
        assert all(number >= len(found) - 3 for number in exposed), found


def test_alone_tokens_travel_while_what_is_all_mine_is_computed(marking):
    case = case_of(2, [40], kernel="marking")
    plan, cluster = case.plan(), Cluster(2, trace_compute=True)

    def run() -> None:
        mark_step(FORWARD)
        run_rank(case, dist.group.WORLD)

    cluster.run(run)
    assert plan.world == 2
    for events in cluster.trace:
        found = hidden_behind(events, FORWARD)
        assert [] in found and [0] in found, "tokens hide behind the first call, results behind nothing"
