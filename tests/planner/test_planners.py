"""Every planner's plan is a legal partition, balanced and within its byte bounds, and holds what an executor needs."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.distca import distca
from longctx.errors import ConfigError
from longctx.planner import (
    PLANNERS,
    AttentionShape,
    DocumentPlacement,
    Plan,
    PlannerOptions,
    Span,
    TaskRuns,
    Tasks,
    Topology,
    causal,
    check,
    contiguous,
    full,
    make_plan,
    plan,
    prefix_lm,
    shared_prefix,
    streamed,
    window,
    zigzag,
)
from longctx.planner.lengths import draw_rows, synthetic
from longctx.planner.planners.bands import ORDERS, BandSearch
from longctx.planner.planners.cad import _at_homes, _merged, least_egress
from longctx.planner.planners.prefix_affinity import with_prefix_affinity
from tests.planner.dense_executor import dense, execute

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)
SMALL = PlannerOptions(block=4, chunk=8, widths=AttentionShape(4, 2, 3, 8))


def mask_of(kind, lengths):
    if kind == "shared_prefix":
        return shared_prefix(lengths, lengths[::-1], [1 + n // 2 for n in lengths])
    makers = {
        "causal": causal,
        "full": full,
        "window": lambda n: window(n, 5),
        "two_sided": lambda n: window(n, 3, two_sided=True),
        "prefix_lm": lambda n: prefix_lm(n, [size // 3 for size in n]),
    }
    return makers[kind](lengths)


MASKS = ("causal", "full", "window", "two_sided", "prefix_lm", "shared_prefix")


def agrees(made, seed=0):
    """The dense executor's output over the plan is dense attention's, in float64."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, width = made.widths.heads, made.widths.kv_heads, made.widths.head_dim
    total = int(made.home.lengths.sum())
    q = rng.standard_normal((total, heads, width))
    k, v = rng.standard_normal((2, total, kv_heads, width))
    out, lse = execute(made, q, k, v)
    want_out, want_lse = dense(made.mask, q, k, v)
    assert np.linalg.norm(out - want_out) <= 1e-12 * np.linalg.norm(want_out)
    assert np.linalg.norm(lse - want_lse) <= 1e-12 * np.linalg.norm(want_lse)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, servers=st.integers(1, 8), kind=st.sampled_from(MASKS), name=st.sampled_from(list(PLANNERS)))
def test_any_planner_on_any_documents_is_exact(lengths, servers, kind, name):
    made = make_plan(name, mask_of(kind, lengths), Topology(servers, per_node=3), SMALL)
    check(made)
    agrees(made)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, servers=st.integers(1, 8), name=st.sampled_from(list(PLANNERS)), seed=st.integers(0, 99))
def test_any_home_will_do(lengths, servers, name, seed):
    home = scattered(lengths, servers, np.random.default_rng(seed))
    made = make_plan(name, causal(lengths), Topology(servers, per_node=2), SMALL, home)
    assert made.home is home
    check(made)
    agrees(made)


def scattered(lengths, ranks, rng):
    """Random spans on random ranks, some of them empty."""
    held = [[] for _ in range(ranks)]
    for doc, length in enumerate(lengths):
        inner = rng.choice(np.arange(1, length), size=min(length - 1, int(rng.integers(0, 4))), replace=False)
        edges = [0, *sorted(inner.tolist()), length]
        for start, stop in pairwise(edges):
            held[int(rng.integers(ranks))].append(Span(doc, start, stop))
    for spans in held:
        rng.shuffle(spans)
    return DocumentPlacement.of(lengths, held)


def random_plan(lengths, kind, servers, groups, rng):
    """Random cuts along queries and keys, random servers, heads groups apart: any legal partition."""
    mask = mask_of(kind, lengths)
    home = scattered(mask.lengths.tolist(), servers, rng)
    parts = []
    for group in range(groups):
        tasks = Tasks.of_runs(mask, TaskRuns.at_home(home))
        rows = []
        for number in range(len(tasks)):
            pending = [tasks.slice(number)]
            for _ in range(int(rng.integers(0, 4))):
                one = pending.pop(int(rng.integers(len(pending))))
                along_q = rng.integers(2)
                low, high = (one.q0, one.q1) if along_q else (one.k0, one.k1)
                at = int(rng.integers(low, high + 1))
                pending += [part.trimmed() for part in (one.cut_q(at) if along_q else one.cut_k(at)) if part.area]
            rows += [
                (tasks.doc[number], s.q0, s.q1, s.k0, s.k1, s.lo, s.hi, group, tasks.home[number],
                 rng.integers(servers)) for s in pending
            ]  # fmt: skip
        parts += rows
    return Plan("random", home, mask, Tasks(*np.array(parts, dtype=np.int64).T), SMALL.widths, groups)


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    kind=st.sampled_from(MASKS),
    servers=st.integers(1, 8),
    groups=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_any_legal_partition_gives_the_same_result(lengths, kind, servers, groups, seed):
    made = random_plan(lengths, kind, servers, groups, np.random.default_rng(seed))
    check(made)
    agrees(made, seed)


def test_check_finds_what_is_illegal():
    home = streamed([40, 9], 2)
    mask = causal([40, 9])
    tasks = Tasks.of_runs(mask, TaskRuns.at_home(home))
    columns = {name: getattr(tasks, name).copy() for name in tasks.__dataclass_fields__}
    for column, change in (("k0", 1), ("q1", -1), ("home", 1), ("hi", -1), ("hi", 1), ("doc", 1)):
        broken = {name: values.copy() for name, values in columns.items()}
        broken[column][0] += change
        with pytest.raises((ConfigError, IndexError)):
            check(Plan("broken", home, mask, Tasks(**broken), SMALL.widths))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("server", -1, r"tasks of server \[-1\], which must be in \[0, 2\)"),
        ("server", 2, r"tasks of server \[2\], which must be in \[0, 2\)"),
        ("group", -1, r"tasks of heads group \[-1\], which must be in \[0, 1\)"),
        ("group", 1, r"tasks of heads group \[1\], which must be in \[0, 1\)"),
        ("doc", 2, r"tasks of document \[2\], which must be in \[0, 2\)"),
    ],
)
def test_a_task_beside_a_legal_plan_is_refused(column, value, told):
    """Of a server, heads group or document that is not there: no count of cells would miss it."""
    home, mask = streamed([40, 9], 2), causal([40, 9])
    tasks = Tasks.of_runs(mask, TaskRuns.at_home(home))
    columns = {name: getattr(tasks, name) for name in tasks.__dataclass_fields__}
    more = {name: np.append(values, value if name == column else values[0]) for name, values in columns.items()}
    with pytest.raises(ConfigError, match=told):
        check(Plan("broken", home, mask, Tasks(**more), SMALL.widths))


def long_documents(servers, seed=0):
    """A few documents hold most of the work, as in long-context mixtures."""
    rng = np.random.default_rng(seed)
    budget, lengths = servers * 4096, [4096 * max(1, servers // 4)]
    while sum(lengths) < budget:
        lengths.append(min(int(rng.lognormal(5.5, 1.0)) + 1, budget - sum(lengths)))
    return lengths


@pytest.mark.parametrize("servers", [2, 8, 24, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_cad_keeps_its_bounds(servers, seed):
    lengths = long_documents(servers, seed)
    options = PlannerOptions(block=32)
    made = make_plan("cad", causal(lengths), Topology(servers), options)
    cost = made.cost
    block = options.block * max(lengths) / cost.work.mean()
    assert cost.imbalance <= 1 + options.tolerance + (block if block > options.tolerance else 0)
    limit = int(cost.work.sum() * (1 + options.tolerance) / servers)
    least = least_egress(made.home, made.mask, limit).max()
    assert cost.q_sent.max() <= max(1.5 * least, least + 16 * options.block)
    start, stop = made.tasks.q0, made.tasks.q1
    moved = made.tasks.home != made.tasks.server
    spans = {(d, a) for d, a in zip(made.home.doc.tolist(), made.home.start.tolist(), strict=True)}
    for doc, low, high in zip(made.tasks.doc[moved].tolist(), start[moved].tolist(), stop[moved].tolist(), strict=True):
        assert (high - low) % options.block == 0 or (doc, low) in spans, "a moved run is whole blocks or begins a span"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    st.integers(2, 9),
    st.sampled_from([streamed, contiguous]),
    st.sampled_from([1, 16, 128]),
    st.sampled_from([1.0, 1.5]),
)
def test_bands_for_few_servers_are_legal_within_the_limit_and_the_egress(lengths, servers, layout, block, egress):
    home, mask = layout(lengths, servers), causal(lengths)
    load = np.bincount(home.rank, weights=mask.area(home.doc, home.start, home.stop), minlength=servers).astype(int)
    limit = int(load.sum() * 1.02 / servers)
    assume(load.max() > limit)
    cap = int(egress * least_egress(home, mask, limit).max())
    bands = BandSearch(home, load, limit, np.full(servers, cap), PlannerOptions(block=block))
    begins = set(zip(home.doc.tolist(), home.start.tolist(), strict=True))
    for order in ORDERS:
        placed = bands.place(order)
        if placed is None:
            continue
        made = Plan("bands", home, mask, _tasks(mask, home, placed), AttentionShape())
        check(made)
        assert made.cost.work.max() <= limit and made.cost.q_sent.max() <= cap
        for run, server in placed:
            assert server != run.home
            assert (run.stop - run.start) % block == 0 or (run.doc, run.start) in begins


def _tasks(mask, home, placed):
    return Tasks.of_runs(mask, _merged(home, [(*each, 0, home.stride) for each in placed]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(1, 7), st.integers(0, 200))
def test_seats_are_those_of_tokens_that_read_less_there(lengths, servers, cap):
    """For every rank that sends its ends away, the keys that it is spared outweigh the queries and what they bring."""
    mask, widths = causal(lengths), AttentionShape()
    for home in (streamed(lengths, servers), contiguous(lengths, servers), zigzag(lengths, servers)):
        limit = int(mask.area(home.doc, home.start, home.stop).sum())
        preferred = with_prefix_affinity(home, widths, np.full(servers, cap), limit)
        runs = _at_homes(TaskRuns.at_home(preferred), home)
        made = Plan("seats", home, mask, Tasks.of_runs(mask, runs), widths)
        check(made)
        assert made.cost.q_sent.max() <= cap
        before = make_plan("local", mask, Topology(servers), PlannerOptions(), home).cost
        assert made.cost.moved < before.moved or preferred is home


def test_ends_behind_ends_go_to_one_seat():
    """0 .. 400 on three ranks as heads and tails; of the outer two the last rows are few."""
    spans = [[Span(0, 0, 2), Span(0, 399, 400)], [Span(0, 2, 40), Span(0, 390, 399)], [Span(0, 40, 390)]]
    home = DocumentPlacement.of([400], spans)
    spare = np.full(3, 20)
    preferred = with_prefix_affinity(home, AttentionShape(), spare, 10**6)
    assert [preferred.spans(rank) for rank in range(3)] == [
        spans[0][:1],
        spans[1][:1],
        [Span(0, 40, 390), Span(0, 390, 399), Span(0, 399, 400)],
    ]
    only_short = with_prefix_affinity(home, AttentionShape(), np.full(3, 5), 10**6)
    assert only_short.spans(0) == spans[0][:1] and only_short.spans(1) == [
        Span(0, 2, 40),
        Span(0, 390, 399),
        Span(0, 399, 400),
    ]
    assert (
        with_prefix_affinity(home, AttentionShape(), 0 * spare, 10**6) is home
        and with_prefix_affinity(home, AttentionShape(), spare, 400) is home
    )


def test_bands_are_taken_where_they_move_less(monkeypatch):
    """Rows of 128K on eight servers; without bands the remains of every room cost a prefix each."""
    saved = []
    for seed in range(4):
        mask = causal(np.concatenate(draw_rows(synthetic(0), 131072, 2, np.random.default_rng(seed))))
        ours = make_plan("cad", mask, Topology(8), PlannerOptions())
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["longctx.planner.planners.cad"], "FEWEST", 0)
            without = make_plan("cad", mask, Topology(8), PlannerOptions())
        assert ours.cost.imbalance <= 1.02 and ours.cost.moved <= without.cost.moved
        saved.append(1 - ours.cost.moved / without.cost.moved)
    assert max(saved) > 0.15 and sum(saved) / len(saved) > 0.05


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, servers=st.integers(2, 6))
def test_least_egress_is_the_greedy_over_rows(lengths, servers):
    home, mask = streamed(lengths, servers), causal(lengths)
    work = np.zeros(servers, dtype=np.int64)
    keys = [[] for _ in range(servers)]
    for rank in range(servers):
        for span in home.spans(rank):
            keys[rank] += list(range(span.start + 1, span.stop + 1))
        work[rank] = sum(keys[rank])
    limit = int(work.sum() * 1.02 / servers)
    for rank, found in enumerate(least_egress(home, mask, limit).tolist()):
        left, rows = int(work[rank]), 0
        for most in sorted(keys[rank], reverse=True):
            if left <= limit:
                break
            left, rows = left - most, rows + 1
        assert found == rows


def test_another_home_lowers_the_least_egress():
    """Zigzag over all ranks leaves nothing to ship; contiguous shards leave more on one rank than mirrored pieces."""
    lengths, servers = long_documents(16), 16
    mask = causal(lengths)
    limit = int(mask.area(np.arange(len(lengths)), np.zeros_like(lengths), np.array(lengths)).sum() * 1.02 / servers)
    worst = [least_egress(make(lengths, servers), mask, limit).max() for make in (zigzag, streamed, contiguous)]
    assert worst[0] == 0 < worst[1] < worst[2]


def test_distca_balances_to_its_tolerance_with_more_bytes():
    lengths, servers = long_documents(16), 16
    home, mask = streamed(lengths, servers), causal(lengths)
    theirs = Plan("distca", home, mask, Tasks.of_runs(mask, distca(home, 0.02)), AttentionShape())
    check(theirs)
    ours = make_plan("cad", mask, Topology(servers), PlannerOptions(block=32), home)
    assert ours.cost.imbalance <= 1.02
    assert ours.cost.moved < 0.8 * theirs.cost.moved


def test_bytes_count_each_token_once_per_server():
    lengths = [64]
    home = DocumentPlacement.of(lengths, [[Span(0, 0, 64)], []])
    mask = causal(lengths)
    rows = [(0, 40, 48, 0, 1), (0, 48, 64, 0, 1), (0, 0, 40, 0, 0)]
    runs = TaskRuns.of_rows(*np.array(rows, dtype=np.int64).T)
    cost = Plan("two tasks", home, mask, Tasks.of_runs(mask, runs), AttentionShape(4, 2, 8, 2)).cost
    row, kv = 4 * 8 * 2, 2 * 2 * 8 * 2
    assert (cost.q, cost.o, cost.kv, cost.lse) == (24 * row, 24 * row, 64 * kv, 24 * 16)
    assert cost.forward == cost.moved + cost.lse == 48 * row + 64 * kv + 24 * 16
    assert cost.backward == 4 * 24 * row + 24 * 16 + 2 * 64 * kv
    assert cost.work.sum() == 64 * 65 // 2


def test_zigzag_moves_no_queries_and_all_gather_moves_every_key():
    lengths, servers = [100, 7, 1, 55], 4
    zig = make_plan("per_document_zigzag", causal(lengths), Topology(servers), SMALL)
    assert zig.cost.q == 0
    assert zig.home.tokens.max() - zig.home.tokens.min() <= 2 * len(lengths)
    gather = make_plan("all_gather", causal(lengths), Topology(servers), SMALL)
    assert gather.cost.kv_sent.sum() == (servers - 1) * sum(lengths)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12), ranks=st.integers(1, 9))
def test_homes_have_equal_tokens(lengths, ranks):
    for home in (streamed(lengths, ranks), contiguous(lengths, ranks)):
        assert home.tokens.max() - home.tokens.min() <= 1
    leftovers = zigzag(lengths, ranks).tokens
    assert leftovers.max() - leftovers.min() <= 1


def test_a_home_must_partition():
    for spans in ([[Span(0, 0, 4)], []], [[Span(0, 0, 4)], [Span(0, 3, 5)]], [[Span(0, 0, 5), Span(0, 5, 5)], []]):
        with pytest.raises(ConfigError, match="partition"):
            DocumentPlacement.of([5], spans)


def test_plans_are_cached_by_content():
    lengths = [33, 5, 70]
    first = plan("cad", causal(lengths), Topology(4), SMALL)
    assert plan("cad", causal(list(lengths)), Topology(4), SMALL) is first
    others = [
        plan("min_heap", causal(lengths), Topology(4), SMALL),
        plan("cad", full(lengths), Topology(4), SMALL),
        plan("cad", causal([33, 5, 71]), Topology(4), SMALL),
        plan("cad", causal(lengths), Topology(5), SMALL),
        plan("cad", causal(lengths), Topology(4), PlannerOptions(block=4, widths=SMALL.widths)),
        plan("cad", causal(lengths), Topology(4), SMALL, contiguous(lengths, 4)),
    ]
    assert first not in others and len({id(one) for one in others}) == len(others)


@pytest.mark.parametrize("name", list(PLANNERS))
def test_the_same_arguments_give_the_same_plan(name):
    lengths = long_documents(6)
    first, second = (
        make_plan(name, causal(lengths), Topology(6, per_node=2), PlannerOptions(block=16)) for _ in range(2)
    )
    for column in first.tasks.__dataclass_fields__:
        assert np.array_equal(getattr(first.tasks, column), getattr(second.tasks, column))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match="valid planners"):
        plan("greedy", causal([4]), Topology(1))
    with pytest.raises(ConfigError, match="same"):
        plan("cad", causal([4]), Topology(2), home=streamed([4], 3))
    for wrong in ({"tolerance": -0.1}, {"block": 0}, {"egress": 0.5}, {"chunk": 0}, {"capacity": 0.9}):
        with pytest.raises(ConfigError, match="at least"):
            PlannerOptions(**wrong)
    with pytest.raises(ConfigError, match="at least one server"):
        Topology(0)
