"""Nodes of a world: said once, and what a group makes of them."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longctx.comm import Links, exchange, group_of, node_of, per_node, register_nodes
from longctx.comm.nodes import _runs, links_of
from longctx.sim import Cluster


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_no_two_nodes_are_ever_taken_for_one(nodes):
    size = _runs(tuple(nodes))
    fits = [
        n for n in range(1, len(nodes) + 1) if all(len(set(nodes[i : i + n])) == 1 for i in range(0, len(nodes), n))
    ]
    assert size == max(fits)


@pytest.mark.parametrize(
    ("nodes", "size"),
    [([5], 1), ([0, 0, 0], 3), ([0, 0, 1, 1, 2], 2), ([0, 1, 0, 1], 1), ([0, 0, 1, 1, 1, 1], 2), ([0, 1, 1, 1], 1)],
)
def test_equal_runs_are_nodes(nodes, size):
    assert _runs(tuple(nodes)) == size


def test_groups_of_strided_ranks_know_their_own_nodes():
    """Two nodes of four ranks: neighbours, every second rank, every fourth."""

    def body():
        register_nodes([rank // 4 for rank in range(8)])
        found = []
        for stride in (1, 2, 4):
            groups = [dist.new_group(list(range(first, 8, stride))) for first in range(stride)]
            found.append(per_node(group_of(groups[dist.get_rank() % stride]).ranks))
        return *found, per_node(group_of(None).ranks), [node_of(rank) for rank in range(8)]

    assert Cluster(8).run(body) == [(4, 2, 1, 1, [0, 0, 0, 0, 1, 1, 1, 1])] * 8


def test_a_world_of_which_nobody_said_it_is_one_node():
    assert node_of(7) == 0
    assert Cluster(3).run(lambda: per_node(group_of(dist.group.WORLD).ranks)) == [3] * 3


def test_a_group_has_its_share_of_a_nodes_nics_and_never_more():
    def body(nodes, ranks):
        register_nodes(nodes, Links(nics=4))
        return links_of(ranks).nics

    assert Cluster(8).run(body, [0] * 4 + [1] * 4, range(8)) == [4] * 8
    assert Cluster(8).run(body, [0] * 4 + [1] * 4, range(0, 8, 2)) == [2] * 8
    assert Cluster(8).run(body, [0] * 4 + [1] * 4, [3, 7]) == [1] * 8
    # A lone rank on the first node makes runs of the whole world short, but not those of the others.
    assert Cluster(9).run(body, [0] + [1] * 4 + [2] * 4, range(1, 9)) == [4] * 9
    # A node that is taken for two has no more NICs for it.
    assert Cluster(8).run(body, [0] * 4 + [1] * 2 + [2] * 2, range(8)) == [2] * 8


def test_nodes_are_settled_once_and_forgotten_with_their_world():
    def body(nodes):
        register_nodes(nodes)
        with pytest.raises(AssertionError, match="once"):
            register_nodes(nodes)
        return per_node(group_of(dist.group.WORLD).ranks)

    cluster = Cluster(2)
    assert cluster.run(body, [0, 1]) == [1, 1]
    assert cluster.run(body, [0, 0]) == [2, 2]


def test_bytes_between_nodes_are_those_of_the_ledger():
    def body():
        register_nodes([0, 0, 1, 1])
        # Of a strided group: its ranks are on nodes 0 and 1.
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        mine, everyone = group_of(pairs[dist.get_rank() % 2]), group_of(dist.group.WORLD)
        exchange(mine, [(1 - mine.rank, torch.ones(5))], [(1 - mine.rank, torch.empty(5))]).wait()
        sends = [(to, torch.ones(1 + to)) for to in everyone.others]
        exchange(everyone, sends, [(of, torch.empty(1 + everyone.rank)) for of in everyone.others]).wait()
        return mine.bytes_between_nodes + everyone.bytes_between_nodes, group_of(None).bytes_between_nodes

    cluster = Cluster(4)
    counted = [went for went, nothing in cluster.run(body) if nothing == 0]
    edges = cluster.ledger.by_edge()
    assert counted == [sum(n for (a, b), n in edges.items() if a == rank and a // 2 != b // 2) for rank in range(4)]
    assert min(counted) > 20
