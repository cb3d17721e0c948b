"""The nodes of a run: what the cluster says, or how its launcher numbered the ranks."""

import pytest

from longctx.config import ClusterConfig, Config
from longctx.errors import ConfigError
from longctx.launcher.ranks.world import nodes_of


def config_of(devices):
    return Config(cluster=ClusterConfig(devices_per_node=devices))


@pytest.mark.parametrize(
    ("local", "nodes"),
    [
        (range(4), [0, 0, 0, 0]),
        ([0, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1]),
        ([0, 0, 0], [0, 1, 2]),
        ([0], [0]),
    ],
)
def test_local_ranks_tell_the_nodes(local, nodes):
    assert nodes_of(config_of(None), local) == nodes


def test_what_the_cluster_says_counts():
    assert nodes_of(config_of(2), range(5)) == [0, 0, 1, 1, 2]
    assert nodes_of(config_of(8), [0, 0, 1, 1]) == [0, 0, 0, 0]


@pytest.mark.parametrize("local", [[0, 0, 1, 1], [1, 2], [0, 2]])
def test_ranks_dealt_round_robin_are_refused(local):
    with pytest.raises(ConfigError, match=r"node by node .* cluster\.devices_per_node"):
        nodes_of(config_of(None), local)
