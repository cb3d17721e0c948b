"""Runs on several nodes: planners follow the nodes, and metrics tell what crossed between them."""

import json
from pathlib import Path

import pytest

from longctx.attention import disaggregated, ticks
from longctx.launcher import build
from longctx.sequence import make_plan
from longctx.sim import Cluster
from longctx.train.report import render
from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import corpus, small_config, train_on_sim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def config_of(directory, parallel, devices, strategy="zeppelin", **sections):
    layout = "zigzag" if strategy == "ring" else None
    sections = {"attention": {"strategy": strategy, "layout": layout}, "train": {"steps": 2}, **sections}
    return small_config(directory, parallel=parallel, cluster={"devices_per_node": devices}, **sections)


@pytest.mark.parametrize("strategy", ["zeppelin", "ring"])
@pytest.mark.parametrize("parallel", [{"sp": 4}, {"tp": 2, "sp": 2}, {"dp_shard": 2, "sp": 2}], ids=str)
def test_metrics_tell_what_crossed_between_nodes(tmp_path, monkeypatch, strategy, parallel):
    clusters = []
    monkeypatch.setattr(build, "Cluster", lambda *args, **more: clusters.append(Cluster(*args, **more)) or clusters[0])
    monkeypatch.setattr(build, "open_corpus", lambda *args, **kwargs: corpus())
    config = config_of(tmp_path, parallel, 2, strategy, train={"steps": 1}, logger={"report": True})
    build.run_sim(config, resume=False)
    edges = clusters[0].ledger.by_edge("send")  # nothing but attention sends from rank to rank here
    across = [sum(n for (a, b), n in edges.items() if a == rank and a // 2 != b // 2) for rank in range(4)]
    [record] = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    assert record["comm_bytes"] == sum(edges.values())
    assert record["comm_bytes_between_nodes"] == sum(across)
    tells = range(0, 4, parallel.get("tp", 1))
    assert record["bytes_between_nodes_by_rank"] == [across[rank] for rank in tells]
    assert (sum(across) > 0) == ("dp_shard" not in parallel), "groups of neighbours are on one node"
    page = render(tmp_path)
    assert "of these between nodes, median" in page and "B to other nodes" in page


@pytest.mark.parametrize(
    ("parallel", "devices", "per_node"),
    [
        ({"sp": 4}, 2, 2),
        ({"sp": 4}, None, 4),
        ({"sp": 4}, 3, 3),
        ({"tp": 2, "sp": 2}, 2, 1),
        ({"tp": 2, "sp": 2}, 4, 2),
    ],
)
def test_plans_follow_the_nodes_of_the_sequence_group(tmp_path, monkeypatch, parallel, devices, per_node):
    """And each is made once, for the thread that plans ahead and the operator ask for the same."""
    make_plan.cache_clear()
    asked, plan = [], disaggregated.planned
    monkeypatch.setattr(disaggregated, "planned", lambda *args: asked.append(args) or plan(*args))
    found, _ = train_on_sim(config_of(tmp_path / "shared", parallel, devices))
    assert {(topology.servers, topology.per_node) for *_, topology in asked} == {(parallel["sp"], per_node)}
    batches = [homes.documents for homes, *_ in asked]
    assert len(set(batches)) == len(batches) > 0
    alone, _ = train_on_sim(config_of(tmp_path / "alone", {}, None, "local"))
    assert largest_difference(found, alone) <= 1e-9


def test_plans_of_all_stages_follow_their_nodes(tmp_path, monkeypatch):
    asked, plan = [], ticks.planned
    monkeypatch.setattr(ticks, "planned", lambda *args: asked.append(args) or plan(*args))
    attention = {"strategy": "zeppelin", "layout": None, "servers": "pipeline"}
    mesh = {"pp": 2, "sp": 2, "pp_schedule": "gpipe"}
    train_on_sim(config_of(tmp_path, mesh, 2, attention=attention))
    assert {(topology.servers, topology.per_node) for *_, topology in asked} == {(4, 2)}
    assert len(asked) == 2 * 2 * 3  # steps, passes and ticks
