"""Runs on several nodes: planners follow the nodes, and metrics tell what crossed between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.attention.strategies.disaggregated import lockstep as ticks
from longctx.attention.strategies.disaggregated import prepared as disaggregated
from longctx.launcher import build, cli
from longctx.reporting.report.page import render
from longctx.sequence.plan import known_plan
from longctx.sim import Cluster
from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import corpus, small_config, train_on_sim

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def config_of(directory, parallel, devices, strategy="zeppelin", nics=1, **sections):
    layout = "zigzag" if strategy == "ring" else None
    sections = {"attention": {"strategy": strategy, "layout": layout}, "train": {"steps": 2}, **sections}
    return small_config(directory, parallel=parallel, cluster={"devices_per_node": devices, "nics": nics}, **sections)


@pytest.mark.parametrize("strategy", ["zeppelin", "ring"])
@pytest.mark.parametrize("parallel", [{"sp": 4}, {"tp": 2, "sp": 2}, {"dp_shard": 2, "sp": 2}], ids=str)
def test_metrics_tell_what_crossed_between_nodes(tmp_path, monkeypatch, strategy, parallel):
    clusters = []
    monkeypatch.setattr(build, "Cluster", lambda *args, **more: clusters.append(Cluster(*args, **more)) or clusters[0])
    monkeypatch.setattr(build, "open_corpus", lambda *args, **kwargs: corpus())
    config = config_of(tmp_path, parallel, 2, strategy, train={"steps": 1}, logger={"report": True})
    build.run_sim(config, resume=None)
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
    known_plan.cache_clear()
    asked, plan = [], disaggregated.planned
    monkeypatch.setattr(disaggregated, "planned", lambda *args: asked.append(args) or plan(*args))
    found, _ = train_on_sim(config_of(tmp_path / "shared", parallel, devices))
    assert {(topology.servers, topology.per_node) for *_, topology in asked} == {(parallel["sp"], per_node)}
    batches = [plans[0].documents for plans, *_ in asked]
    assert len(set(batches)) == len(batches) > 0
    alone, _ = train_on_sim(config_of(tmp_path / "alone", {}, None, "local"))
    assert largest_difference(found, alone) <= 1e-9


def test_plans_of_all_stages_follow_their_nodes(tmp_path, monkeypatch):
    asked, plan = [], ticks.planned
    monkeypatch.setattr(ticks, "planned", lambda *args: asked.append(args) or plan(*args))
    attention = {"strategy": "zeppelin", "layout": None, "server_pool": "pipeline"}
    mesh = {"pp": 2, "sp": 2, "pp_schedule": "gpipe"}
    train_on_sim(config_of(tmp_path, mesh, 2, attention=attention))
    assert {(topology.servers, topology.per_node) for *_, topology in asked} == {(4, 2)}
    assert len(asked) == 2 * 2 * 3  # steps, passes and ticks


ROUTED = {
    "zeppelin": ({"sp": 4}, {"strategy": "zeppelin", "layout": None}, {}),
    "in turns": ({"sp": 4}, {"strategy": "disaggregated", "layout": None, "ping_pong": True}, {"micro_batch": 2}),
    "stages": (
        {"pp": 2, "sp": 2, "pp_schedule": "gpipe"},
        {"strategy": "disaggregated", "layout": None, "server_pool": "pipeline"},
        {"global_batch": 3},  # ticks in which one stage has nothing
    ),
}


@pytest.mark.parametrize("case", ROUTED)
def test_routed_runs_are_the_runs_that_they_were_and_hand_on_bytes(tmp_path, case):
    mesh, attention, train = ROUTED[case]
    sections = {"attention": attention, "train": {"steps": 2, **train}}
    straight, plain = train_on_sim(config_of(tmp_path / "straight", mesh, 2, **sections))
    found, routed = train_on_sim(config_of(tmp_path / "routed", mesh, 2, nics=2, **sections))
    without_bytes = [[row[:3] for row in run] for run in (found, straight)]
    assert without_bytes[0] == without_bytes[1], "bit by bit"
    assert routed.ledger.by_operation()["send"] > plain.ledger.by_operation()["send"]

    def across(cluster):
        return sum(size for (a, b), size in cluster.ledger.by_edge("send").items() if a // 2 != b // 2)

    assert across(routed) == across(plain), "what is handed on stays in its node"


@pytest.mark.gloo
def test_a_launched_run_is_routed_over_gloo(tmp_path):
    """Four processes as two nodes of two; the canary compares with dense attention, the run with simulated ranks."""
    options = ["attention=zeppelin", "parallel.sp=4", "cluster.devices_per_node=2", "cluster.nics=2", "model.layers=1"]
    options += ["data.max_documents=20", "data.seq_len=301", "train.steps=2", "train.global_batch=2"]
    options += ["train.dtype=float64", "logger=none"]

    def told(command, name):
        where = f"run.dir={tmp_path}/{name}"
        if command == ["train", "comm=sim"]:  # needs no process of its own
            assert cli.main([*command, *options, where]) == 0
        else:
            argv = [sys.executable, "-m", "longctx.launcher.cli", *command, *options, where]
            ended = subprocess.run(
                argv,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert ended.returncode == 0, ended.stderr
        assert json.loads((tmp_path / name / "environment.json").read_text())["canary"]["passed"]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        keys = ("comm_bytes", "comm_bytes_between_nodes", "bytes_by_rank", "bytes_between_nodes_by_rank", "loss")
        return [[record[key] for key in keys] for record in map(json.loads, lines)]

    launched = told(["launch", "--nproc", "4"], "gloo")
    simulated = told(["train", "comm=sim"], "sim")
    assert [row[:-1] for row in launched] == [row[:-1] for row in simulated]
    assert [row[-1] for row in launched] == pytest.approx([row[-1] for row in simulated], rel=1e-12)
    options.remove("cluster.nics=2")
    straight = told(["train", "comm=sim"], "straight")
    for routed, plain in zip(simulated, straight, strict=True):
        assert routed[0] > plain[0] and routed[1] == plain[1]
        assert routed[-1] == plain[-1], "bit by bit"
