"""Zones, routes and the remapping of tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from longctx.planner import PlannerOptions, Topology
from longctx.planner.planners.zeppelin import remap, route, zone_layout, zones


def test_zones_by_length():
    topology = Topology(8, per_node=4)
    lengths = np.array([6000, 1400, *[100] * 6])
    found = zones(lengths, topology, PlannerOptions(capacity=1.25))
    assert found.zone[0] == 2 and len(found.members[0]) == 8
    assert found.zone[1] == 1 and {rank // 4 for rank in found.members[1]} in ({0}, {1})
    assert set(found.zone[2:]) == {0}


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(1, 9), st.integers(1, 4), st.floats(1.0, 1.5)
)
def test_every_document_has_a_place(lengths, servers, per_node, capacity):
    topology = Topology(servers, per_node=per_node)
    found = zones(np.array(lengths), topology, PlannerOptions(capacity=capacity))
    for zone, members in zip(found.zone, found.members, strict=True):
        nodes = {rank // per_node for rank in members}
        assert members and len(set(members)) == len(members) and max(members) < servers
        assert zone == (2 if len(nodes) > 1 else int(len(members) > 1))
    assert zone_layout(np.array(lengths), topology, PlannerOptions(capacity=capacity)).tokens.sum() == sum(lengths)


def test_many_nics_pay_where_links_are_faster():
    volume = 1e9
    ways, seconds = route(volume, Topology(16, per_node=8, link=450e9, nic=50e9, nics=8))
    times = {x: volume / (x * 50e9) + 2 * volume * (x - 1) / (x * 450e9) for x in range(1, 9)}
    assert (ways, seconds) == (min(times, key=times.get), min(times.values()))
    assert ways == 8
    slow_links = Topology(16, link=60e9, nic=50e9)
    assert route(volume, slow_links) == (1, volume / 50e9)
    assert route(volume, Topology(16, nics=1))[0] == 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_remap_levels_tokens_and_stays_inside_nodes(tokens, per_node):
    tokens = np.array(tokens)
    ranks, total = len(tokens), sum(tokens)
    topology = Topology(ranks, per_node=per_node)
    moves = remap(tokens, topology)
    after = tokens.copy()
    np.subtract.at(after, moves.source, moves.count)
    np.add.at(after, moves.dest, moves.count)
    target = np.diff([rank * total // ranks for rank in range(ranks + 1)])
    assert np.array_equal(after, target)
    assert moves.count.sum() == np.maximum(tokens - target, 0).sum(), "no token moves that need not"
    assert np.all(moves.count > 0)
    sent = {}
    for source, start, count in zip(*(c.tolist() for c in (moves.source, moves.start, moves.count)), strict=True):
        sent.setdefault(source, []).append((start, start + count))
    for source, parts in sent.items():
        flat = [place for low, high in sorted(parts) for place in range(low, high)]
        assert flat == list(range(int(tokens[source]) - len(flat), int(tokens[source]))), "each token once"
    surplus = tokens - target
    across = moves.source // per_node != moves.dest // per_node
    least = sum(max(0, int(surplus[n * per_node : (n + 1) * per_node].sum())) for n in range(topology.nodes))
    assert moves.count[across].sum() == least


def test_what_leaves_a_node_is_levelled_over_its_ranks():
    moves = remap(np.array([30, 30, 0, 0]), Topology(4, per_node=2))
    assert sorted(moves.count.tolist()) == [15, 15]
    moves = remap(np.array([40, 20, 6, 0, 0, 0]), Topology(6, per_node=3))
    across = moves.source // 3 != moves.dest // 3
    leaving = np.bincount(moves.source[across], weights=moves.count[across], minlength=6)
    assert leaving[:3].tolist() == [24, 9, 0]
