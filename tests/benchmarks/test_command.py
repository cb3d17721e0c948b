"""``python -m benchmarks``: what each benchmark refuses, and that the small ones run."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHES, main
from benchmarks.commands import attention as bench_attention
from benchmarks.commands import balance as bench_balance
from benchmarks.commands import planning as bench_planning
from benchmarks.hosts import memory_group
from benchmarks.hosts.memory_group import MemoryGroup
from benchmarks.peers import ATTENTION_PEERS
from longctx.errors import NotAvailableError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words, code, said",
    [
        ([], 2, "the following arguments are required: NAME"),
        (["nonsense"], 2, "'attention', 'trainer', 'context', 'link', 'planning', 'linear', 'disaggregation'"),
        (["attention", "train.seed=1"], 2, "unrecognized arguments: train.seed=1"),
        (["trainer", "--heads", "2"], 2, "unrecognized arguments: --heads"),
        (["attention", "--strategies", "ring,nonsense"], 78, "valid: ring, striped, burst"),
        (["attention", "--strategies", "local"], 78, "--strategies 'local' is unknown"),
        (["attention", "--strategies", "ring,ring"], 78, "name each once"),
        (["attention", "--peers", "horovod"], 78, "valid: torch_ring, torch_allgather, ulysses"),
        (["attention", "--kv-heads", "8,two"], 78, "--kv-heads '8,two' must be whole numbers"),
        (["attention", "--repeats", "0"], 78, "--repeats 0 must be at least 1"),
        (["attention", "--heads", "6", "--kv-heads", "4"], 78, "nearest valid: kv_heads=3"),
        (["attention", "--world", "3", "--heads", "8", "--strategies", "ulysses"], 78, "leave it out of --strategies"),
        (["attention", "--peer-python", "/bin/false"], 78, "--peer-python /bin/false cannot import longctx"),
        (["trainer", "--peer-python", "python3"], 2, "unrecognized arguments: --peer-python"),
        (["trainer", "--pairs", "1"], 78, "at least 2"),
        (["trainer", "--pairs", "2", "train.seeed=1"], 78, "train.seed"),
        (["context", "--systems", "torch,horovod"], 78, "horovod"),
        (["trainer", "train.steps=7"], 2, "this command sets train.steps itself"),
        (["trainer", "comm=sim"], 2, "this command sets comm itself"),
        (["trainer", "train.dtype=float64"], 78, "nearest valid: train.dtype=float32"),
        (["trainer", "attention.window=5"], 78, "nearest valid: attention.window=null"),
        (["trainer", "attention=rsa", "attention.document_mask=true"], 78, "its rows of scores are whole"),
        (["link", "train.seed=1"], 2, "unrecognized arguments: train.seed=1"),
        (["attention", "--rate-mbit", "100"], 2, "unrecognized arguments: --rate-mbit 100"),
        (["link", "--rate-mbit", "0"], 78, "--rate-mbit 0 must be at least 1"),
        (["link", "--link-tokens", "3"], 78, "--link-tokens 3 must be at least 4"),
        (["link", "--link-heads", "8"], 78, "two numbers such as 8/2"),
        (["link", "--link-heads", "8/3"], 78, "nearest valid: kv_heads=2"),
        (["context", "--tile", "0"], 78, "--tile 0 must be at least 1"),
        (["context", "--allowance", "-5"], 78, "--allowance -5 must be at least 1"),
        (["context", "--start", "8192", "--cap", "4096"], 78, "--start 8192 must not exceed --cap 4096"),
        (["context", "--systems", "longctx,longctx"], 78, "name each once"),
        (["context", "data.seq_len=4096"], 2, "this command sets data.seq_len itself"),
        (["context", "--start", "1000"], 78, "multiple of 128"),
        (["context", "--start", "128"], 78, "multiple of 512 for ulysses"),
        (["context", "--start", "512,512"], 78, "2 numbers; give 1 or 3"),
        (["planning", "--servers", "8,x"], 78, "--servers '8,x' must be whole numbers"),
        (["planning", "--contexts", "0"], 78, "--contexts '0' must be whole numbers above 0"),
        (["planning", "--draws", "0"], 78, "must be at least 1"),
        (["planning", "--balance", "0"], 78, "--balance '0' must be whole numbers above 0"),
        (["planning", "--balance", "1", "--clock"], 78, "--balance 1 does nothing with --clock"),
        (["planning", "--balance", "1", "--timed", "2"], 78, "--timed 2 does nothing with --balance"),
        (["planning", "--clock", "--servers", "8"], 78, "--servers 8 does nothing with --clock"),
        (["planning", "--lengths", "/nowhere.json"], 65, "JSON list of document lengths"),
        (["disaggregation", "--processes", "0"], 78, "--processes 0 must be at least 1"),
        (["disaggregation", "--batch-tokens", "33"], 78, "must divide by --processes 2; nearest valid: 32"),
        (["disaggregation", "--longest", "16385"], 78, "--longest 16385 must be 1 to 16384"),
        (["disaggregation", "--short", "9,3"], 78, "--short 9,3 must be two lengths from 1, ascending"),
        (["disaggregation", "--layer", "8,3,64"], 78, "key/value heads that divide them"),
        (["disaggregation", "--ways", "zigzag"], 78, "valid: disaggregated, zeppelin, zigzag_ring"),
        (["disaggregation", "--rounds", "0"], 78, "--rounds 0 must be at least 1"),
        (["planning", "--rounds", "3"], 2, "unrecognized arguments: --rounds 3"),
    ],
)
def test_refusals(words, code, said, capsys):
    assert main([*words]) == code
    assert said in capsys.readouterr().err


def test_help_tells_each_benchmark_in_a_line(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, purpose in BENCHES.items():
        assert name in out and purpose in out
        assert main([name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


def test_overrides_may_stand_between_options(capsys):
    assert main(["trainer", "attention.window=5", "--pairs", "2", "train.micro_batch=4"]) == 78
    assert "nearest valid: attention.window=null" in capsys.readouterr().err


def test_context_without_memory_groups_is_not_available(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory_group.require, "__defaults__", (tmp_path,))
    assert main(["context"]) == 69
    assert "cgroup" in capsys.readouterr().err


def memory_groups_are_here() -> bool:
    try:
        memory_group.require()
    except NotAvailableError:
        return False
    return True


TAKE = """
import sys
import time
from pathlib import Path
from benchmarks.hosts.memory_group import MemoryGroup
group = MemoryGroup(Path(sys.argv[1]))
group.join()
group.limit(group.in_use() + (32 << 20))
held = bytearray(int(sys.argv[2]) << 20)
"""


@pytest.mark.skipif(not memory_groups_are_here(), reason="needs root and cgroup version 1")
@pytest.mark.parametrize("mebibytes, killed", [(8, False), (128, True)])
def test_a_process_that_takes_too_much_is_killed(mebibytes, killed):
    with MemoryGroup(memory_group.ROOT / f"longctx-test-{os.getpid()}-{mebibytes}") as group:
        done = subprocess.run(
            [sys.executable, "-c", TAKE, str(group.folder), str(mebibytes)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert (done.returncode == -9, group.killed()) == (killed, killed)
    assert not group.folder.exists()


@pytest.mark.gloo
def test_strategies_and_peers_are_told_in_one_table_and_absent_peers_loudly(bench):
    words = ["--seq", "64", "--heads", "4", "--kv-heads", "4,2", "--head-dim", "8", "--repeats", "1"]
    done = bench("attention", *words, "--strategies", "ring,usp,rsa")
    assert done.code == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 64 |")]
    for table in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):  # 4 key/value heads, then 2
        told = {(row[1], row[2]): row[3:] for row in table}
        assert len(told) == 5 + len(ATTENTION_PEERS)
        ours = [
            ("ring", "contiguous"),
            ("ring", "zigzag"),
            ("ring", "striped"),
            ("usp", "zigzag"),
            ("rsa", "contiguous"),
        ]
        for row in ours:
            share, error = told[row][2:]
            assert float(share.split()[0]) > 0 and float(error.split()[0]) < 1e-5
        for peer in ATTENTION_PEERS.values():
            if peer.missing():
                assert (peer.title, f"not installed: pip install {peer.install}") in told
    assert "64 tokens: the best peer, " in done.stdout


def test_a_peer_that_is_wrong_or_refuses_is_told_so():
    def spread(at):
        return {"median": at, "low": at, "high": at, "repeats": 1}

    wrong = {"out": 1e-7, "dq": 1e-7, "dk": 1.3, "dv": 0.9}
    row = {"setting": "halves", "peer": True, "floor": None, "share_of_floor": None, "refused": None}
    rows = [
        {**row, "who": "careless", "errors": wrong, "time": spread(0.5)},
        {**row, "who": "absent", "errors": {}, "time": None, "refused": "not installed: pip install absent"},
    ]
    arguments = argparse.Namespace(world=2, heads=8, head_dim=64)
    cell = {"seq": 4096, "heads": 8, "kv_heads": 8, "rows": rows, "ahead": None, "best": None, "best_peer": None}
    text = bench_attention.table(arguments, {"repeats": 1, "load": "0.0", "seconds": 1.0}, [cell])
    assert "| 4096 | careless | halves | 500 (once) |  |  | **wrong**: 1.3e+00 (dk) |" in text
    assert "| 4096 | absent | not installed: pip install absent | | | | |" in text
    assert "4096 tokens: no exact peer was timed" in text


@pytest.mark.gloo
def test_the_trainer_and_the_bare_loop_take_the_same_steps(bench):
    words = ["--pairs", "2", "--json", "data.seq_len=48", "model.layers=1", "logger.wandb=disabled"]
    done = bench("trainer", *words)
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["pairs"] == 2
    assert set(told["rows"]) == {"wall", "cpu"}
    assert told["largest_loss_difference"] < 1e-5 * 6


def test_planning_balances_with_fewer_bytes_than_the_greedy(capsys):
    words = ["--servers", "16", "--contexts", "131072,1048576", "--draws", "1", "--timed", "1", "--json"]
    assert main(["planning", *words]) == 0
    rows = {row["planner"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {row["context"] for row in rows.values()} == {131072}, "1M tokens do not fit 16 servers"
    assert rows["cad"]["imbalance"] <= 1.02 and rows["cad"]["egress_over_least"] <= 1.5
    assert rows["cad"]["gigabytes"] < 0.8 * rows["distca 0.02"]["gigabytes"]


def remembered(monkeypatch, module, name):
    """Calls of the function with the same words are computed once."""
    known, function = {}, getattr(module, name)

    def once(lengths, *words):
        if words not in known:
            known[words] = function(lengths, *words)
        return known[words]

    monkeypatch.setattr(module, name, once)


def test_planning_tells_what_balanced_data_leave(capsys, monkeypatch):
    remembered(monkeypatch, bench_balance, "balanced")
    words = ["--balance", "1,4", "--servers", "4", "--contexts", "32768", "--draws", "1"]
    assert main(["planning", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    means = {(row["rows"], row["balance"]): {k: v["mean"] for k, v in row.items() if type(v) is dict} for row in found}
    for one in means.values():
        assert one["attention"] >= one["floor"] >= 1
        assert one["attention"] > one["step"] <= one["lockstep"] * (1 + 1e-12)
    assert means[1, "rows"] == means[1, "none"], "one row a rank can only change places"
    assert means[4, "rows"]["lockstep"] < means[4, "none"]["lockstep"]
    assert means[4, "rows"]["seen"] == means[4, "none"]["seen"], "dealing changes no row"
    assert means[4, "rows"]["gigabytes"] < means[4, "none"]["gigabytes"]
    assert main(["planning", *words]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6


def test_planning_on_the_clock_shows_both_ablations(capsys, monkeypatch):
    remembered(monkeypatch, bench_planning, "clock")
    assert main(["planning", "--clock", "--contexts", "131072", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 1 < row["wlb_over_cad_gather_hidden"] < row["wlb_over_cad"] < row["fixed_over_cad"]
    assert row["wlb_over_cad_idle_not_serving"] < row["wlb_over_cad"]
    assert main(["planning", "--clock", "--contexts", "131072"]) == 0
    assert "gather hidden" in capsys.readouterr().out
