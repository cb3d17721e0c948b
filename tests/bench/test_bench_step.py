"""``longctx bench step``, and both benchmarks on real ranks. Times mean nothing here."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.bench.step import PARTS, TimedEngine, measure
from longctx.config import Config, resolve
from longctx.data import open_corpus
from longctx.launcher import build
from longctx.launcher.cli import main
from longctx.launcher.commands.bench import step as bench_step
from longctx.launcher.compose import compose
from longctx.mesh import build_mesh

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = ("data.seq_len=64", "model.layers=1", "train.global_batch=2", "data.max_documents=20", "train.canary=false")


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["comm=sim"], 78, "comm=sim: its ranks take turns in one process"),
        (["--steps", "0"], 78, "--steps 0 must be at least 1; 5 is the default"),
        (["--warm-up", "0"], 78, "--warm-up 0 must be at least 1; 3 is the default"),
        (["train.global_batch=3", "parallel.dp_shard=2"], 78, "train.global_batch=3 must be a multiple of 2"),
        (["data=text", "data.path=/nowhere"], 65, "/nowhere"),
        (["attention=ulysses", "parallel.sp=3"], 78, "refuses"),
        (["cluster.nodes=2"], 78, "cluster.nodes=2, but this command runs on this machine alone"),
    ],
)
def test_refusals(words, code, said, capsys):
    assert main(["bench", "step", *words]) == code
    assert said in capsys.readouterr().err


def measured(*words, steps=2):
    """What two simulated ranks find."""
    config = compose([*TINY, "parallel.sp=2", "comm=sim", *words])

    def one_rank(config: Config):
        meter = build.meter_of(config, build_mesh(config.parallel, "cpu"), CPU, lambda: 7)
        parts = build.build_step(config, open_corpus(config.data, config.model.vocab_size), meter, None)
        engine = parts.step.engine
        cost = measure(config, parts, meter, 1, steps)
        parts.prefetcher.close()
        assert parts.step.engine is engine and not isinstance(engine, TimedEngine)
        return cost

    return build.simulate(config, one_rank, resolve(config, 2))


def test_parts_add_up_and_ranks_agree():
    first, second = measured()
    assert first == second
    assert list(first.parts) == list(first.parts_by_rank) == list(PARTS)
    assert all(len(ranks) == 2 and min(ranks) >= 0 for ranks in first.parts_by_rank.values())
    assert 0 <= first.exchange_wait <= first.parts["forward_backward"]
    assert first.seconds.repeats == 2 and first.seconds.low <= sum(first.parts.values()) * 1.5
    assert first.tokens == 2 * 64
    assert first.tokens_per_second == pytest.approx(first.tokens / first.seconds.median)
    assert first.tokens_per_second_per_device == pytest.approx(first.tokens_per_second / 2)
    assert first.memory_bytes["peak"] == sum(count for name, count in first.memory_bytes.items() if name != "peak") > 0
    assert first.memory_peak_bytes == 7 and first.comm_bytes > 0
    assert first.mfu_causal is None and first.mfu_full is None, "nobody knows a processor's peak"


def test_a_run_that_does_not_measure_memory_tells_none():
    first, _ = measured("logger.memory=false", steps=1)
    assert first.memory_bytes is None and first.loss > 0


def test_the_steps_are_those_of_the_run(monkeypatch):
    """The third loss here is that of the trainer's third step."""
    first, _ = measured()
    config = compose([*TINY, "parallel.sp=2", "comm=sim", "logger=none", "train.steps=100"])
    losses = []

    class Sink:
        def step(self, record):
            losses.append(record["loss"])

        def close(self, summary):
            pass

    def one_rank(config: Config):
        meter = build.meter_of(config, build_mesh(config.parallel, "cpu"), CPU, lambda: None)
        trainer = build.build_trainer(config, None, open_corpus(config.data, config.model.vocab_size), meter)
        trainer.sink = Sink()
        for _ in range(3):
            record, _ = trainer._step()
            trainer.sink.step(record)
        trainer.prefetcher.close()

    monkeypatch.setattr(build, "open_sink", lambda *given, **named: None)
    resolved = resolve(config, 2)
    build.simulate(config, one_rank, replace(resolved, run=replace(resolved.run, dir="unused")))
    assert losses[4] == losses[5] == first.loss


# Each rank runs both commands, as under torchrun, which gives a launch its own port.
RANK = """
import os, sys
from longctx.launcher.cli import main
tiny, ports = sys.argv[1].split(), sys.argv[2:]
benches = ["attention", "--strategies", "gather,ring,ulysses", "--repeats", "2"], ["step", "--steps", "2"]
for port, words in zip(ports, benches):
    os.environ["MASTER_PORT"] = port
    status = main(["bench", *words, "--json", "parallel.sp=2", *tiny])
    if status:
        sys.exit(status)
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.gloo
def test_ranks_of_a_launcher_measure_on_their_own_mesh(tmp_path):
    words = [sys.executable, "-c", RANK, " ".join((*TINY, f"run.dir={tmp_path / 'run'}")), *free_ports(2)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            words,
            env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[1][0] == "", "the first rank tells"
    attention, step = map(json.loads, outputs[0][0].splitlines())
    assert [row["strategy"] for row in attention["rows"]] == ["gather", "ring", "ulysses"]
    for row in attention["rows"]:
        assert row["refused"] is None and max(row["errors"].values()) < 1e-10
        assert row["time"]["repeats"] == 2 and len(row["bytes_forward"]) == 2 and min(row["bytes_forward"]) > 0
        assert row["share_of_floor"]["low"] > 0 and row["peak_extra_bytes"] > 0
    assert (attention["world"], attention["sequence_ranks"], attention["backend"]) == (2, 2, "gloo")
    assert step["mesh"]["sp"] == 2 and step["steps"] == 2 and step["tokens"] == 128
    assert step["seconds"]["median"] > 0 and step["memory_peak_bytes"] > 2**20 and step["mfu_causal"] is None
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.gloo
def test_without_a_launcher_it_starts_its_own_and_tells_people(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "step", "--steps", "1", "--warm-up", "1", *TINY[:-1]]) == 0
    out = capsys.readouterr().out
    assert out.startswith("one rank on gloo (cpu): model tiny, ring, 2 × 64 tokens a step, float32\n")
    for said in ("a step", "forward and backward", "tokens/s", "activations kept for backward", "nothing was written"):
        assert said in out
    assert list(tmp_path.iterdir()) == []


def test_a_crowded_machine_is_told(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    config = compose(["parallel.sp=4"])
    from longctx.launcher.commands.bench.ranks import oversubscription

    assert oversubscription(config, 4) == "4 processes on 2 cores: times measure the scheduler as well"
    assert oversubscription(config, 2) is None
    assert bench_step.WARM_UP >= 2, "the optimizer's state and FSDP2's streams are made in the first"
