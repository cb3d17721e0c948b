"""The loop and its composition root: records, checkpoints, orderly stops, and what is refused beforehand."""

import contextlib
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.errors import ConfigError, DataError, LongctxError, NumericsError, RequeueError, StorageError
from longctx.launcher import build
from longctx.launcher.resuming import Resume
from longctx.mesh import build_mesh
from longctx.reporting.meter import Meter, training_flops
from longctx.sim import Cluster
from tests.train.small_run import CPU, MODEL, Recorder, corpus, small_config

KEYS = [
    "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "flops", "mfu_causal",
    "mfu_full", "memory_peak_bytes", "comm_bytes", "comm_bytes_between_nodes", "balance",
    "work_by_rank", "bytes_by_rank", "bytes_between_nodes_by_rank", "straggler_tokens", "padding",
    "validation_loss", "validation_seconds",
]  # fmt: skip


def config_on_sim(directory, **sections):
    sections = {"parallel": {"sp": 2}, "train": {"steps": 4}, **sections}
    return small_config(directory, **sections)


def simulate(config, resume=None):
    """``run_sim`` on the tests' corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "open_corpus", lambda *args, **kwargs: corpus())
        build.run_sim(config, resume)


def records_of(config):
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_leaves_the_files_of_the_contract_and_tells_what_it_is(tmp_path, capsys):
    sections = {"checkpoint": {"every": 2, "at_end": True}, "logger": {"progress": True}}
    config = config_on_sim(tmp_path, train={"steps": 3, "canary": True}, **sections)
    simulate(config)
    records = records_of(config)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all([key for key in r if key != "nonfinite"] == KEYS for r in records)
    first = records[0]
    assert first["tokens"] == 2 * 61
    assert first["mfu_causal"] is first["mfu_full"] is first["memory_peak_bytes"] is None
    assert first["comm_bytes"] > 0 and first["balance"] >= 1.0
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["canary"]["passed"] and environment["packages"]["torch"].startswith("2.13.0")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]
    facts, told = environment["run"], capsys.readouterr().out
    assert first["flops"] > 0 and facts["ranks"] == 2 and facts["steps"] == 3
    assert 0 < facts["parameters_per_rank"] < facts["parameters"]
    for words in (
        r"canary: comparing one tiny step with the dense single-device step \.\.\. ok in \d+\.\d s\n",
        rf"  parameters  {facts['parameters']}|[\d.]+k, at most [\d.]+k? on a rank\n",
        r"  mesh        2 ranks: sp 2\n",
        r"  attention   ring, layout zigzag, kernel \w+\n",
        r"  arithmetic  float64 on cpu over sim\n",
        r"  steps       1 to 3 of 122 tokens, [\d.]+ epochs in all\n",
        r"  checkpoints every 2 steps, every 10 minutes, at the end; the newest 3 are kept\n",
        r"step 1/3  loss [^$]*step 3/3  loss [^$]*finished: step 3 of 3, \d:\d\d\n",
        rf"  loss            {records[-1]['loss']:.4f} in step 3, lowest ",
        rf"  checkpoint      {tmp_path}/checkpoints/step-3\n",
        rf"  to extend       longctx train --resume={tmp_path} train\.steps=6\n",
    ):
        assert re.search(words, told), words


def test_a_resumed_run_is_the_run_it_resumes(tmp_path, monkeypatch):
    whole = config_on_sim(tmp_path / "whole", train={"steps": 5})
    simulate(whole)
    stopped = config_on_sim(tmp_path / "parts", train={"steps": 5}, checkpoint={"every": 2})
    real = build.requests
    with monkeypatch.context() as patch:
        patch.setattr(build, "requests", lambda: signalled(real))
        with pytest.raises(RequeueError, match="saved step 1 of 5") as stop:
            simulate(stopped)
    assert stop.value.exit_code == 75
    simulate(stopped, resume=Resume())
    same = [(r["loss"], r["grad_norm"], r["lr"]) for r in records_of(stopped)]
    assert same == [(r["loss"], r["grad_norm"], r["lr"]) for r in records_of(whole)]


@contextlib.contextmanager
def signalled(real):
    """``requests`` after the signal has come, and the run has begun to work."""
    with real() as asked:
        asked._phase = "working"
        os.kill(os.getpid(), signal.SIGTERM)
        yield asked


def one_rank_is_asked_to_stop(config):
    mesh = build_mesh(config.parallel, "cpu")
    meter = Meter(mesh, CPU, stop=lambda: mesh.sequence_rank == 1)
    trainer = build.build_trainer(config, None, corpus(), meter)
    trainer.sink = recorder = Recorder()
    with pytest.raises(RequeueError):
        trainer.run()
    return trainer.state.step, recorder.summary


def test_all_ranks_stop_when_one_is_asked(tmp_path):
    config = config_on_sim(tmp_path)
    for step, summary in Cluster(2).run(one_rank_is_asked_to_stop, config):
        assert step == 1
        assert summary["outcome"] == "stopped"
    assert (tmp_path / "checkpoints" / "step-1").is_dir()


def diverging(config):
    trainer = build.build_trainer(config, None, corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU))
    trainer.sink = recorder = Recorder()
    with pytest.raises(NumericsError, match="step 3"):
        trainer.run()
    return recorder.summary, trainer.state.model.norm.weight.to_local().isfinite().all().item()


def test_a_diverging_run_ends_and_says_so(tmp_path, monkeypatch):
    from longctx.model import Decoder

    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, *args: forward(self, *args) * float("nan"))
    for summary, finite in Cluster(2).run(diverging, config_on_sim(tmp_path)):
        assert (summary["outcome"], summary["skipped_updates"]) == ("failed", 3)
        assert finite
    assert not (tmp_path / "checkpoints").exists()


def test_errors_of_ranks_reach_the_command_as_they_are(tmp_path):
    config = config_on_sim(tmp_path)
    with pytest.raises(StorageError) as error:
        simulate(config, resume=Resume())
    assert error.value.exit_code == 74


@pytest.mark.parametrize(
    "sections,error,message",
    [
        ({"attention": {"strategy": "striped", "layout": "zigzag"}}, ConfigError, "attention.layout=striped"),
        ({"attention": {"kernel": "fast"}}, ConfigError, "valid: auto, flash_cuda"),
        ({"data": {"source": "text", "path": "/nowhere/at/all"}}, DataError, "/nowhere/at/all"),
    ],
)
def test_preflight_refuses_before_any_process_starts(tmp_path, sections, error, message):
    config = config_on_sim(tmp_path)
    for name, fields in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **fields)})
    with pytest.raises(LongctxError, match=message) as refused:
        build.preflight(config, resume=None)
    assert isinstance(refused.value, error)


def test_preflight_wants_a_checkpoint_to_resume_from(tmp_path):
    with pytest.raises(StorageError, match="without --resume"):
        build.preflight(config_on_sim(tmp_path), resume=Resume())


def test_flops_of_a_dense_step_are_six_per_weight_and_token():
    weights = 2 * 32 * ((2 * 4 + 2 * 2) * 8 + 3 * 48) + 256 * 32
    assert training_flops(MODEL, 64, tokens=10, cells=0) == 6 * weights * 10
    # Two layers, four heads of eight: two products forward and four backward, two FLOP each.
    assert training_flops(MODEL, 64, tokens=0, cells=5) == 12 * 2 * 4 * 8 * 5
