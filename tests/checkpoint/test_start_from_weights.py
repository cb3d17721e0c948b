"""A new run takes the weights of another one, and nothing else of it."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from longctx.config import simulated_world_size
from longctx.errors import ConfigError, StorageError
from longctx.launcher import build
from longctx.launcher.cli import main
from longctx.launcher.resuming import Resume
from longctx.launcher.rundir.resumed_config import configuration
from longctx.mesh import build_mesh
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from tests.checkpoint.test_resume import SMALL, steps_of
from tests.train.small_run import CPU, Recorder, corpus, small_config

SOURCE = {"dp_shard": 2}
MESHES = [{}, {"sp": 2, "tp": 2}, {"pp": 2}]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two steps on two ranks, at 61 tokens a sequence."""
    directory = tmp_path_factory.mktemp("source") / "run"
    config = small_config(directory, parallel=SOURCE, train={"steps": 2}, checkpoint={"at_end": True})
    Cluster(2, trace=False).run(lambda: first_loss(config, steps=2))
    return directory


def first_loss(config, steps=1):
    """The loss of a run's first steps on one rank."""
    trainer = build.build_trainer(config, None, corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU))
    trainer.sink.close({})
    trainer.sink = recorder = Recorder()
    trainer.run()
    return [(record["loss"], record["lr"]) for record in recorder.records]


def other(directory, source, mesh, **train):
    """Another length, data order, schedule and mesh than the source's."""
    return small_config(
        directory,
        model={"rope_theta": 5e5},
        attention={"window": 40},
        data={"seq_len": 122},
        parallel=mesh,
        optim={"lr": 1e-4, "warmup_steps": 7},
        train={"steps": 1, "seed": 11, "global_batch": 4, "micro_batch": 1, **train},
        init={"from_": str(source)},
    )


def evaluated(config, source):
    """The loss of the old weights on the new run's first batch, read without anything of ours."""
    parts = build.build_step(config, corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU), None)
    whole = {}
    for file in sorted((source / "checkpoints/step-2").glob("*.safetensors")):
        for name, shard in load_file(file).items():
            whole.setdefault(name, []).append(shard)
    weights = {
        name.removeprefix("model."): torch.cat(shards) for name, shards in whole.items() if name.startswith("model.")
    }
    model = parts.state.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(weights[name])
    loss = parts.step.gradients(parts.prefetcher.take(more=False)).loss
    parts.prefetcher.close()
    return loss


def test_step_one_is_the_old_weights_on_the_new_data_on_any_mesh(source, tmp_path, caplog):
    (expected,) = Cluster(1, trace=False).run(lambda: evaluated(other(tmp_path / "plain", source, {}), source))
    for number, mesh in enumerate(MESHES):
        config = other(tmp_path / str(number), source, mesh)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            (loss, rate), *_ = Cluster(simulated_world_size(config), trace=False).run(first_loss, config)[0]
        assert loss == pytest.approx(expected, rel=1e-12)
        assert rate == pytest.approx(1e-4 / 7), "the schedule begins anew"
        (told,) = [r.getMessage() for r in caplog.records if "weights are those of" in r.getMessage()]
        assert "step-2" in told and "model.rope_theta=500000.0 (was 10000.0)" in told
        assert "attention.window=40 (was null)" in told
    config = other(tmp_path / "bf16", source, {}, dtype="bfloat16")
    ((loss, _),) = Cluster(1, trace=False).run(lambda: first_loss(config))[0]
    assert loss == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"layers": 3}}, "model.layers=3 .was 2."),
        (
            {"model": {"heads": 2, "kv_heads": 1, "head_dim": 16}},
            "model.heads=2 .was 4.",
        ),
        ({"model": {"tie_embeddings": False}}, "model.tie_embeddings=false .was true."),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(source, tmp_path, sections, words):
    config = small_config(tmp_path / "new", **{**sections, "init": {"from_": str(source)}})
    with pytest.raises(ConfigError, match=words):
        build.check_weights(source / "checkpoints/step-2", build.on_meta(config), config.to_dict())


def test_damage_is_found_where_the_weights_are_read(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    file = next((tmp_path / "copy/checkpoints/step-2").glob("rank-00001.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    config = other(tmp_path / "new", tmp_path / "copy", {})
    with pytest.raises(Exception, match="damaged: its SHA-256"):
        Cluster(1).run(lambda: first_loss(config))


def test_the_command_pins_the_step_and_a_resume_needs_the_source_no_longer(tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    assert main(["train", *SMALL, "train.steps=2", f"run.dir={run}"]) == 0
    words = [*SMALL, "data.seq_len=64", "train.steps=1", f"run.dir={new}", f"init.from={run}"]
    words.remove("data.seq_len=32")
    assert main(["train", *words]) == 0
    assert f"from: {run}/checkpoints/step-2" in (new / "config.yaml").read_text()
    shutil.rmtree(run)
    assert main(["train", f"--resume={new}", "train.steps=2"]) == 0
    assert steps_of(new) == [1, 2]
    assert configuration(words, Resume()).init.from_ == f"{run}/checkpoints/step-2"
    with pytest.raises(ConfigError, match=r"init\.from=elsewhere is for a new run"):
        configuration([f"run.dir={new}", "init.from=elsewhere"], Resume())
    with pytest.raises(StorageError, match="holds no committed checkpoint"):
        configuration([f"init.from={tmp_path}"], None)
