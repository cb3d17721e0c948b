"""Attention whose messages between nodes are routed over several NICs: the same numbers, and the bytes of the form."""

import pytest
import torch.distributed as dist

from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.assignment import one_node, topology_of
from longctx.attention.strategies.disaggregated.execute import bundles_of
from longctx.attention.strategies.disaggregated.prepared import dispatches
from longctx.comm import Links, register_nodes
from longctx.options import StrategyOptions
from longctx.planner import AttentionShape, Topology
from longctx.sim import Cluster
from longctx.verify import VerifyCase
from longctx.verify.run import judge, run_rank
from tests.volume.measure import costs


def check(case, per_node, links):
    """Exact, with the bytes of the form; returns how many of the five exchanges were routed."""
    plan, asked = case.plan(), set()

    def body():
        register_nodes([rank // per_node for rank in range(case.world)], links)
        asked.add(topology_of(range(case.world)))
        return run_rank(case, dist.group.WORLD)

    cluster = Cluster(case.world, seed=case.seed)
    results = cluster.run(body)
    verdict, _ = judge(case, results)
    assert verdict.passed, verdict.errors
    [topology] = asked
    assert topology == Topology(case.world, per_node, links.link, links.nic, links.nics)
    sizes = Sizes(case.batch, case.heads, case.kv_heads, case.head_dim, 8, 8, options=case.options, topology=topology)
    volume_of, total = costs(case.strategy).volume, 0
    for rank in range(case.world):
        volume = volume_of(plan, rank, sizes)
        assert (verdict.bytes_forward[rank], verdict.bytes_backward[rank]) == (volume.forward, volume.backward)
        total += volume.forward + volume.backward
    assert cluster.ledger.by_operation().get("send", 0) == total
    planner = {"disaggregated": "cad"}.get(case.strategy, case.strategy)
    widths = AttentionShape(case.heads, case.kv_heads, case.head_dim, 8)
    there, back = dispatches(plan, planner, widths, topology)
    made = [there.routes(b) for b in bundles_of(there, sizes)[0]] + [back.routes(b) for b in bundles_of(back, sizes)[1]]
    return sum(one is not None for one in made)


def case_of(world, lengths, strategy, grad_dtype="fp32", **options):
    return VerifyCase(
        strategy, options.pop("layout", "contiguous"), world, seq=sum(lengths), documents=tuple(lengths),
        head_dim=4, heads=2, kv_heads=1, options=StrategyOptions(grad_dtype), **options,
    )  # fmt: skip


LENGTHS = {"one": [97], "long and short": [70, 3, 1, 1, 40, 9, 22], "short": [9, 13, 4, 8, 11, 2, 30, 1, 1]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("world", "per_node"), [(4, 2), (8, 4), (5, 2), (7, 4)])
@pytest.mark.parametrize("strategy", ["zeppelin", "disaggregated"])
def test_routed_attention_is_exact(world, per_node, strategy, lengths):
    case = case_of(world, LENGTHS[lengths], strategy, seed=world)
    routed = check(case, per_node, Links(nics=per_node))
    assert routed > 0 or world == 5, "where the last node is one rank alone, routing may be of no use"


@pytest.mark.parametrize(
    "options",
    [{"layout": "zigzag"}, {"batch": 2}, {"grad_dtype": "compute"}, {"window": 5}, {"causal": False}],
    ids=str,
)
def test_with_every_layout_and_option(options):
    assert check(case_of(8, LENGTHS["long and short"], "zeppelin", **options), 4, Links(nics=4, link=5000e9)) > 0


@pytest.mark.parametrize(("per_node", "nics"), [(4, 1), (8, 8), (1, 8)])
def test_one_nic_one_node_and_nobody_to_carry_send_straight(per_node, nics):
    assert check(case_of(8, LENGTHS["long and short"], "zeppelin"), per_node, Links(nics=nics)) == 0


def test_ranks_in_a_pipeline_or_beside_tensors_share_the_nics_of_their_node():
    """Two nodes of eight ranks and NICs; of a group of every second rank, four of each node with as many NICs."""

    def body():
        register_nodes([rank // 8 for rank in range(16)], Links(nics=8))
        return [topology_of(range(16)), topology_of(range(0, 16, 2)), topology_of(range(8)), topology_of([3, 11])]

    shapes = [(one.servers, one.per_node, one.nics) for one in Cluster(16).run(body)[0]]
    assert shapes == [(16, 8, 8), (8, 4, 4), (8, 8, 8), (2, 1, 1)]


def test_a_world_of_which_nobody_said_its_nodes_is_the_one_that_plans_assume():
    """Else what is asked for without a group would be planned again."""
    assert Cluster(3).run(lambda: topology_of(range(3))) == [one_node(3)] * 3
