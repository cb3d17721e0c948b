"""Messages that several NICs of a node carry: every byte once, no detour, all NICs alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.planner import Topology, routes
from longctx.planner.planners.zeppelin import route
from longctx.planner.routing import _cut, _nic, _nics, _ways


@st.composite
def exchanges(draw):
    """Bytes of one to three tensors between ranks, and the ranks' nodes; some send nothing."""
    servers = draw(st.integers(1, 9))
    topology = Topology(servers, per_node=draw(st.integers(1, 5)), nics=draw(st.integers(1, 6)))
    seed, number = draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 50, (number, servers, servers)) * generator.integers(0, 2, (number, servers, servers))
    return sizes.astype(np.int64), topology


def forced(sizes, topology):
    """Cut wherever a message alone would be."""
    number, source, dest = np.nonzero(sizes * (1 - np.eye(topology.servers, dtype=np.int64)))
    return _cut(number, source, dest, sizes[number, source, dest], _ways(source, dest, topology), topology)


@given(exchanges())
def test_every_byte_arrives_once_and_only_the_two_nodes_carry_it(exchange):
    sizes, topology = exchange
    found, node = forced(sizes, topology), topology.node
    arrived = [np.zeros(sizes.shape, dtype=np.int64) for _ in range(2)]
    spans = {}
    for number, start, stop, path in (p for rank in range(topology.servers) for p in found.of(rank) if p[3][0] == rank):
        source, out, into, dest = path
        assert start < stop and node(source) == node(out) and node(into) == node(dest)
        assert node(source) != node(dest) or path == (source, dest, dest, dest), "what stays in its node goes straight"
        assert (source == out) == (into == dest) or node(source) == node(dest), "a proxy hands on to a counterpart"
        arrived[0][number, source, dest] += stop - start
        spans.setdefault((number, source, dest), []).append((start, stop))
    away = sizes * (1 - np.eye(topology.servers, dtype=np.int64))
    assert np.array_equal(arrived[0], away)
    for message, parts in spans.items():
        ends = [0, *(stop for _, stop in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1] and ends[-1] == away[message], "side by side"
    assert sum(found.sent(rank)[0] for rank in range(topology.servers)) >= away.sum()


@given(exchanges())
def test_parts_of_a_message_are_alike_and_no_two_share_a_nic(exchange):
    sizes, topology = exchange
    found = forced(sizes, topology)
    crossing = topology.node(found.path[:, 0]) != topology.node(found.path[:, -1])
    for number, source, dest in {
        tuple(row) for row in np.c_[found.number, found.path[:, 0], found.path[:, -1]][crossing]
    }:
        mine = crossing & (found.number == number) & (found.path[:, 0] == source) & (found.path[:, -1] == dest)
        lengths = (found.stop - found.start)[mine]
        assert lengths.max() - lengths.min() <= 1
        for end in (1, 2):
            nics = _nic(topology, found.path[mine, end])
            assert len(set(nics.tolist())) == len(nics)
        both = min(int(_nics(topology, rank)) for rank in (source, dest))
        assert len(lengths) == min(both, sizes[number, source, dest])


@pytest.mark.parametrize(("per_node", "nics"), [(2, 2), (4, 4), (8, 8), (8, 4), (4, 2)])
def test_one_sender_s_bytes_load_all_nics_of_both_nodes_alike(per_node, nics):
    topology, size = Topology(2 * per_node, per_node=per_node, nics=nics), 1000 * per_node
    sizes = np.zeros((1, 2 * per_node, 2 * per_node), dtype=np.int64)
    sizes[0, 1, -1] = sizes[0, 1, per_node] = size
    found = routes(sizes, topology)
    for end, node in ((1, 0), (2, 1)):
        nic = _nic(topology, found.path[:, end]) - node * per_node
        load = np.bincount(nic, weights=found.stop - found.start)
        assert load.tolist() == [2 * size / nics] * nics


@given(st.integers(1, 10**9), st.integers(2, 8), st.sampled_from([60e9, 101e9, 450e9]))
def test_one_message_takes_as_long_as_route_says(volume, ways, link):
    topology = Topology(2 * ways, per_node=ways, nics=ways, link=link)
    sizes = np.zeros((1, 2 * ways, 2 * ways), dtype=np.int64)
    sizes[0, 0, -1] = volume * ways
    x, seconds = route(volume * ways, topology)
    found = routes(sizes, topology)
    assert (found is None) == (x == 1)
    if found is not None:
        assert len(found.path) == x and found.seconds(topology) == pytest.approx(seconds)


def test_all_goes_straight_where_nothing_is_faster():
    sizes = np.full((2, 8, 8), 1000, dtype=np.int64)
    assert routes(sizes, Topology(8, per_node=4, nics=4)) is None, "every NIC is as busy as any other"
    sizes[:, 0] = 10_000
    assert routes(sizes, Topology(8, per_node=4, nics=4)) is not None
    assert routes(sizes, Topology(8, per_node=4, nics=1)) is None
    assert routes(sizes, Topology(8, per_node=8, nics=8)) is None, "one node"
    assert routes(sizes, Topology(8, per_node=1, nics=8)) is None, "no other rank to carry"
    assert routes(sizes, Topology(8, per_node=4, nics=4, link=90e9)) is None, "links hardly faster than a NIC"
    assert routes(sizes * 0, Topology(8, per_node=4, nics=4)) is None
    assert routes(sizes[:, :1, :1], Topology(1, per_node=4, nics=4)) is None
