"""``--resume`` under another configuration: what is refused before anything is touched, and what is said."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.errors import ConfigError, StorageError
from longctx.launcher import build
from longctx.launcher.resuming import Resume
from longctx.mesh import build_mesh
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from tests.checkpoint.checkpoint_run import make, saved
from tests.train.small_run import CPU, corpus, small_config


def configured(directory, **sections):
    return small_config(directory, **{"train": {"steps": 2}, "checkpoint": {"at_end": True}, **sections})


@pytest.fixture
def data(monkeypatch):
    """The tests' corpus in place of that of the configuration."""
    for name in ("open_corpus", "check_corpus"):
        monkeypatch.setattr(build, name, lambda *args, **kwargs: corpus())


def options_after_resume(config):
    trainer = build.build_trainer(config, Resume(), corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU))
    trainer.sink.close({})
    return [(g["betas"], g["eps"], g["weight_decay"]) for g in trainer.state.optimizer.param_groups]


def test_the_optimizer_follows_the_configuration_of_now_and_changes_are_named(tmp_path, data, caplog):
    build.run_sim(configured(tmp_path), None)
    optim = {"beta1": 0.5, "beta2": 0.7, "eps": 1e-4, "weight_decay": 0.3}
    other = configured(tmp_path, optim=optim, attention={"layout": "striped"}, train={"steps": 3})
    with caplog.at_level(logging.WARNING):
        (options,) = Cluster(1).run(options_after_resume, other)
    assert options == [((0.5, 0.7), 1e-4, 0.3), ((0.5, 0.7), 1e-4, 0.0)]
    (told,) = [r.getMessage() for r in caplog.records if "another configuration" in r.getMessage()]
    for change in ("attention.layout=striped (was zigzag)", "train.steps=3 (was 2)", "optim.beta1=0.5 (was 0.9)"):
        assert change in told
    assert "run." not in told and "logger." not in told


def test_an_unchanged_configuration_is_not_spoken_of(tmp_path, data, caplog):
    build.run_sim(configured(tmp_path), None)
    with caplog.at_level(logging.WARNING):
        Cluster(1).run(options_after_resume, configured(tmp_path, logger={"project": "other"}))
    assert "another configuration" not in caplog.text


@pytest.mark.parametrize(
    "sections,words",
    [
        ({"model": {"dim": 64}}, "model.dim=64 .was 32.; .* init.from="),
        ({"model": {"heads": 2, "kv_heads": 1, "head_dim": 16}}, "model.head_dim=16 .was 8., model.heads=2"),
        ({"model": {"rope_theta": 5e5}}, "model.rope_theta=500000.0 .was 10000.0."),
        ({"model": {"norm_eps": 1e-3}}, "model.norm_eps"),
        ({"attention": {"window": 7}}, "attention.window=7 .was null."),
        ({"attention": {"document_mask": False}}, "attention.document_mask=false .was true."),
        ({"train": {"steps": 2, "dtype": "float32"}}, "train.dtype of the run that wrote it"),
        ({"train": {"steps": 2, "seed": 6}}, "train.seed: 5 in the checkpoint, 6 now"),
        ({"data": {"seq_len": 64}}, "data.seq_len: 61 in the checkpoint, 64 now"),
    ],
)
def test_preflight_refuses_a_checkpoint_of_another_model_or_other_data(tmp_path, data, sections, words):
    build.run_sim(configured(tmp_path), None)
    build.preflight(configured(tmp_path), resume=Resume())
    with pytest.raises(ConfigError, match=words):
        build.preflight(configured(tmp_path, **sections), resume=Resume())


SMALL = [
    "comm=sim", "model.layers=1", "model.dim=16", "model.heads=2", "model.kv_heads=1", "model.head_dim=8",
    "model.hidden_dim=32", "data.seq_len=32", "data.max_documents=9", "logger=none", "train.canary=false",
]  # fmt: skip


def steps_of(run, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (run / name).read_text().splitlines()]


def test_a_run_goes_on_from_the_step_that_is_named_and_nothing_of_it_is_lost(tmp_path, capfd, caplog):
    from longctx.launcher.cli import main

    run = tmp_path / "run"
    words = [*SMALL, "train.steps=4", "checkpoint.every=2", "checkpoint.keep=0"]
    assert main(["train", *words, f"run.dir={run}"]) == 0
    written = (run / "config.yaml").read_bytes()
    metrics = (run / "metrics.jsonl").read_text()
    for refused, why in (
        (["model.hidden_dim=64"], "of another model: model.hidden_dim=64 (was 32)"),
        (["attention.window=8"], "init.from="),
        (["data.seq_len=64"], "data.seq_len"),
        (["--step", "3"], "newest intact earlier one: step 2"),
    ):
        assert main(["train", f"--resume={run}", *refused]) in (74, 78)
        assert why in capfd.readouterr().err
    assert main(["train", *words, f"run.dir={run}"]) == 78
    assert (run / "config.yaml").read_bytes() == written and (run / "metrics.jsonl").read_text() == metrics
    with caplog.at_level(logging.WARNING):
        assert main(["train", f"--resume={run}", "--step", "2", "optim.lr=1e-3", "train.steps=3"]) == 0
    assert "optim.lr=0.001 (was 0.003)" in caplog.text and "checkpoints after step 2 (step-4)" in caplog.text
    assert (
        steps_of(run) == [1, 2, 3] and (run / "metrics.jsonl").read_text().splitlines()[:2] == metrics.splitlines()[:2]
    )
    assert steps_of(run, "metrics.redone.jsonl") == [3, 4]
    assert (run / "config.before-step-2.yaml").read_bytes() == written
    assert CheckpointDirectory(run / "checkpoints").steps() == [2, 3]
    # What was set aside is a run by itself, with the settings that it had.
    other = run / "later-than-step-2"
    assert main(["train", f"--resume={other}", "train.steps=5"]) == 0
    assert steps_of(other) == [1, 2, 3, 4, 5]
    assert (other / "metrics.jsonl").read_text().splitlines()[:4] == metrics.splitlines()


def test_an_attempt_without_a_checkpoint_is_kept_when_the_run_starts_anew(tmp_path):
    from longctx.launcher.cli import main

    words = [*SMALL, "train.steps=2", f"run.dir={tmp_path}/run"]
    assert main(["train", *words, "checkpoint.at_end=false"]) == 0
    assert main(["train", "--resume", *words]) == 74
    assert main(["train", "--auto-resume", *words, "train.seed=1"]) == 0
    assert steps_of(tmp_path / "run", "metrics.attempt-1.jsonl") == steps_of(tmp_path / "run") == [1, 2]
    assert main(["train", "--auto-resume", f"run.dir={tmp_path}/run", "train.steps=3"]) == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    saved(tmp_path, 4)
    (tmp_path / "step-4" / "state.json").unlink()
    checkpointer, state = Checkpointer(tmp_path, keep=2), make(None)
    assert checkpointer.load(state) == 3
    checkpointer.save(5, state)
    assert {3, 5} <= set(CheckpointDirectory(tmp_path).steps())
    assert Checkpointer(tmp_path).load(make(None), 3) == 3
    checkpointer.save(6, state)
    assert CheckpointDirectory(tmp_path).steps() == [5, 6]


def test_a_step_written_anew_is_no_longer_damaged(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "step-3" / "state.json").unlink()
    checkpointer, state = Checkpointer(tmp_path, keep=2), make(None)
    checkpointer.load(state)
    checkpointer.save(3, state)
    assert CheckpointDirectory(tmp_path).steps() == [2, 3]


def test_each_damaged_step_is_told_once_by_preflight_and_load_together(tmp_path, data, caplog):
    config = configured(tmp_path, checkpoint={"every": 1, "at_end": True})
    build.run_sim(config, None)
    (tmp_path / "checkpoints/step-2/state.json").unlink()
    with caplog.at_level(logging.WARNING):
        build.preflight(config, resume=Resume())
        build.run_sim(config, Resume())
        assert caplog.text.count("step 2 is left out") == 1
        caplog.clear()
        for step in (1, 2):
            (tmp_path / f"checkpoints/step-{step}/state.json").unlink()
        with pytest.raises(StorageError, match="none of 2 checkpoints"):
            build.preflight(config, resume=Resume())
        assert "left out" not in caplog.text


def test_a_finished_run_says_what_to_raise(tmp_path, data, caplog):
    config = configured(tmp_path)
    build.run_sim(config, None)
    with caplog.at_level(logging.WARNING):
        build.run_sim(config, Resume())
    assert "step 2 of 2 is done already; raise train.steps to go on" in caplog.text


@pytest.mark.parametrize("skipped", [0, 3])
def test_empty_documents_are_told_and_recorded(tmp_path, monkeypatch, caplog, skipped):
    source = replace(corpus(), skipped_empty=skipped)
    monkeypatch.setattr(build, "open_corpus", lambda *args, **kwargs: source)
    config = configured(tmp_path, parallel={"sp": 2})
    with caplog.at_level(logging.WARNING):
        build.run_sim(config, None)
    assert caplog.text.count("3 empty documents are left out") == (1 if skipped else 0)
    environment = json.loads((Path(config.run.dir) / "environment.json").read_text())
    counts = {"documents": len(source), "tokens": source.total_tokens, "skipped_empty": skipped}
    long = {"policy": "split", "documents": int((source.lengths > config.data.seq_len).sum()), "tokens_left_out": 0}
    assert environment["data"] == counts | {"sha256": source.fingerprint, "long_documents": long}
