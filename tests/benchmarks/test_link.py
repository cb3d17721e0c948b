"""Bytes between nodes: closed forms by receiver against the ledger of sim, and what the benchmark makes of them."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.attention import local_inputs
from benchmarks.link import (
    HEADERS,
    PASSES,
    NoComputeKernel,
    PassTraffic,
    as_predicted,
    busiest,
    bytes_between_nodes,
    judged,
    measure,
    sizes_of,
)
from longctx.attention import get_strategy
from longctx.attention.costs.estimate import Volume
from longctx.catalog import KERNELS
from longctx.comm import group_of
from longctx.options import StrategyOptions
from longctx.sim import Cluster
from longctx.verify import VerifyCase
from longctx.verify.run import attention_of
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import costs, with_row

GRIDS = ((4, 2), (8, 4), (8, 2), (6, 3))  # ranks, of which on one node
ROUTES = ("ring", "burst", "usp", "ulysses")
LAYOUTS = ("contiguous", "zigzag", "striped")
HEADS = ((24, 24), (24, 3), (24, 1))
MASKS = {
    "full": {"causal": False},
    "causal": {},
    "documents": {"documents": (95, 1, 1, 60, 35)},
    "window": {"window": 17},
    "edges full": {"documents": (48, 48, 96), "causal": False},
    "window full": {"causal": False, "window": 5},
}
WAYS = ((), ("grad_dtype", "compute"), ("backward_rotates", "q"), ("backward_rotates", "kv"))


def sent(case: VerifyCase, with_backward: bool) -> dict[int, int]:
    """Runs the passes on this rank; what it counted by receiver."""
    plan, (q, k, v, dout) = local_inputs(case)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = attention_of(case, dist.group.WORLD)(q, k, v, plan.handle)
    if with_backward:
        torch.autograd.grad(out, (q, k, v), dout)
    return dict(group_of(dist.group.WORLD).traffic.by_receiver)


def carried(case: VerifyCase) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Bytes by sender and receiver in the forward pass, and in both: by the ledger, and as comm counted."""
    found = []
    for with_backward in (False, True):
        cluster = Cluster(case.world, trace=False)
        counted = cluster.run(sent, case, with_backward)
        edges = {(rank, to): size for rank, by in enumerate(counted) for to, size in by.items()}
        assert edges == cluster.ledger.by_edge()
        found.append(edges)
    return found[0], found[1]


def check(case: VerifyCase, nodes: int) -> None:
    forward, both = carried(case)
    forms, plan, sizes = costs(case.strategy), case.plan(), sizes_of(case)
    by_edge: dict[tuple[int, int], Volume] = {}
    for rank in range(case.world):
        messages = forms.sends(plan, rank, sizes)
        assert sum((cost for _, cost in messages), Volume(0, 0, 0, 0)) == forms.volume(plan, rank, sizes)
        for to, cost in messages:
            by_edge[rank, to] = by_edge.get((rank, to), Volume(0, 0, 0, 0)) + cost
    assert {edge: cost.forward for edge, cost in by_edge.items() if cost.forward} == forward
    assert {edge: cost.forward + cost.backward for edge, cost in by_edge.items()} == both
    per_node = case.world // nodes
    for (source, target), cost in bytes_between_nodes(case, nodes).items():
        between = [edge for edge in both if (edge[0] // per_node, edge[1] // per_node) == (source, target)]
        assert cost.forward == sum(forward.get(edge, 0) for edge in between)
        assert cost.forward + cost.backward == sum(both[edge] for edge in between)


@pytest.mark.parametrize("axes", pairwise((ROUTES, GRIDS, LAYOUTS, HEADS, tuple(MASKS), WAYS)), ids=str)
def test_closed_forms_by_receiver_are_the_ledgers_edges(axes):
    strategy, (world, inner), layout, (heads, kv_heads), mask, way = axes
    chosen = dict([way] if way and way[0] in get_strategy(strategy).options else [])
    case = VerifyCase(
        strategy,
        layout,
        world,
        seq=192,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        dtype="bfloat16" if layout == "zigzag" else "float32",
        options=with_row(strategy, inner, StrategyOptions(**chosen)),
        **MASKS[mask],
    )
    assert case.refused() is None
    check(case, world // inner)


@pytest.mark.parametrize("strategy", ROUTES)
@pytest.mark.parametrize("length", [1, 3, 37])
def test_empty_ranks_and_odd_lengths_on_every_edge(strategy, length):
    sizes = {"seq": length, "heads": 4, "kv_heads": 2, "head_dim": 4, "batch": 2}
    check(VerifyCase(strategy, "zigzag", 4, **sizes, options=with_row(strategy, 2)), 2)


def case_of(strategy: str, inner: int = 1, kv_heads: int = 8, causal: bool = False) -> VerifyCase:
    return VerifyCase(
        strategy,
        "zigzag",
        4,
        seq=64,
        heads=8,
        kv_heads=kv_heads,
        head_dim=8,
        dtype="float32",
        causal=causal,
        options=with_row(strategy, inner),
    )


def test_without_a_mask_a_flat_ring_crosses_three_blocks_and_the_others_two():
    """A block is a rank's keys and values; a flat ring has one edge each way between the nodes."""
    block = 2 * 16 * 8 * 8 * 4
    flat, double, swapping = (
        bytes_between_nodes(case_of(*route), 2) for route in (("ring",), ("burst", 2), ("usp", 2))
    )
    for way in ((0, 1), (1, 0)):
        assert [routes[way].forward for routes in (flat, double, swapping)] == [3 * block, 2 * block, 2 * block]
        assert (flat[way].backward, swapping[way].backward) == (6 * block, 4 * block)
        # Of both ranks' rows: q, dout, lse and delta, and dq home.
        assert double[way].backward == 2 * 16 * (2 * (8 * 8 * 4 + 8 * 4) + 8 * 8 * 4)


def test_the_busiest_link_counts_all_that_a_node_sends_or_receives():
    assert busiest({(0, 1): 5, (0, 2): 4, (1, 0): 8, (2, 0): 0, (1, 2): 0, (2, 1): 0}) == 9
    assert busiest({(0, 1): 5, (2, 1): 6, (1, 0): 10}) == 11
    assert busiest({}) == 0


def test_what_has_no_closed_form_by_receiver_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match="gather"):
        bytes_between_nodes(replace(case_of("ring"), strategy="gather"), 2)
    with pytest.raises(AssertionError, match="3 nodes"):
        bytes_between_nodes(case_of("ring"), 3)


@pytest.fixture
def silent_kernel(monkeypatch):
    monkeypatch.setitem(KERNELS, "silent", "benchmarks.link:NoComputeKernel")


@pytest.mark.parametrize(("strategy", "inner"), [("ring", 1), ("burst", 2), ("usp", 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_exchange_only_posts_what_the_real_pass_posts(strategy, inner, causal, silent_kernel):
    """The same messages of the same sizes in the same order, waits included, and no attention."""
    traces = []
    for kernel in ("auto", "silent"):
        cluster = Cluster(4)
        cluster.run(sent, replace(case_of(strategy, inner, causal=causal), kernel=kernel), True)
        traces.append(
            [
                [event[0:1] + event[3:5] + event[7:9] for event in events if event.phase in ("post", "wait")]
                for events in cluster.trace
            ]
        )
    assert traces[0] == traces[1] and any(traces[0])


def test_measuring_counts_each_pass_of_each_repeat(silent_kernel):
    """On sim time means nothing, but bytes do: what ranks count is the closed form in every repeat."""
    cases = [case_of("ring"), case_of("burst", 2), case_of("usp", 2, causal=True)]
    ranks = Cluster(4, trace=False).run(lambda: measure(cases, 2, lambda: (0, 0)))
    for number, case in enumerate(cases):
        rows = judged(case, 2, 200, [rank[number] for rank in ranks], (1.0, 1.0))
        assert [row.name for row in rows] == list(PASSES)
        assert all(row.edges_equal and node.counted == node.formula for row in rows for node in row.nodes)


def seen(case: VerifyCase, seconds: float, beyond: int = 0, stray: int = 0) -> list[list[list[PassTraffic]]]:
    """What four ranks would see: the closed form, ``beyond`` bytes and 10 packets on the links."""
    closed, plan, sizes = bytes_between_nodes(case, 2), case.plan(), sizes_of(case)
    ranks = []
    for rank in range(4):
        both = []
        for name in PASSES:
            by: dict[int, int] = {}
            for to, cost in costs(case.strategy).sends(plan, rank, sizes):
                by[to] = by.get(to, 0) + getattr(cost, name)
            by[3 - rank] = by.get(3 - rank, 0) + stray
            node = rank // 2
            on_link = getattr(closed[node, 1 - node], name) + 10 * HEADERS + beyond
            both.append(PassTraffic(seconds, by, on_link, 10))
        ranks.append([both, both])
    return ranks


def test_the_verdict_compares_links_and_counts_with_the_closed_form():
    case = case_of("burst", 2, causal=True)
    right = judged(case, 2, 1, seen(case, 1.0), (2.0, 4.0))
    assert all(row.edges_equal and node.unexplained == 0 for row in right for node in row.nodes)
    for row, name, chained in zip(right, PASSES, (2.0, 4.0), strict=True):
        most = max(getattr(cost, name) for cost in bytes_between_nodes(case, 2).values())
        assert row.busy == pytest.approx(most * 8 / 1e6)
        assert row.predicted == chained and row.ratio == pytest.approx(1 / chained)
    more = judged(case, 2, 1, seen(case, 1.0, beyond=100), (2.0, 4.0))
    assert all(node.unexplained == pytest.approx(100 / node.formula) for row in more for node in row.nodes)
    less = judged(case, 2, 1, seen(case, 1.0, beyond=-100), (2.0, 4.0))
    assert all(node.unexplained == pytest.approx(-100 / node.formula) for row in less for node in row.nodes)
    assert not any(row.edges_equal for row in judged(case, 2, 1, seen(case, 1.0, stray=1), (2.0, 4.0)))


@pytest.mark.parametrize(
    ("predicted", "measured", "right"),
    [
        ((3, 1, 2), (3.3, 1.1, 2.2), True),
        ((3, 1, 2), (3.3, 2.3, 2.2), False),
        ((3, 2, 2), (3.3, 2.1, 2.2), True),
        ((3, 2, 2.04), (3.3, 2.2, 2.1), True),
        ((3, 2, 2.2), (3.3, 2.2, 2.1), False),
        ((3, 2, 2), (2.0, 2.1, 2.2), False),
    ],
)
def test_the_order_counts_where_predictions_are_apart(predicted, measured, right):
    assert as_predicted(predicted, measured) is right


def test_the_silent_kernel_is_never_chosen_by_auto(silent_kernel):
    from longctx.attention.runtime.local_kernel import KernelProblem, select_kernel

    for dtype, heads in itertools.product((torch.float64, torch.float32), (1, 8)):
        problem = KernelProblem("cpu", dtype, heads, 1, 12345 + heads)
        assert select_kernel("auto", problem).name != NoComputeKernel.name
