"""A run that goes on uses what it was trained with, and of the command line what the user says anew."""

import json
from pathlib import Path

import pytest
import yaml

from longctx.config import Config, resolve
from longctx.errors import ConfigError, StorageError, UsageError
from longctx.launcher.resuming import Resume, spelled_out
from longctx.launcher.run_directory import read_config
from longctx.launcher.rundir.resumed_config import configuration

MADE_WITH = {
    "model": {"name": "small", "layers": 2, "rope_theta": 5e5},
    "attention": {"strategy": "burst", "inner_ring": 1, "window": 8, "layout": "zigzag"},
    "parallel": {"sp": 2, "dp_shard": 2},
    "optim": {"lr": 1e-3, "beta2": 0.9},
    "train": {"steps": 30, "seed": 3},
    "comm": {"timeout_seconds": 7.0},
    "run": {"name": "mine"},
}


NEWEST = Resume()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's directory with what a run leaves there, apart from weights."""
    monkeypatch.chdir(tmp_path)
    config = resolve(Config.from_dict({**MADE_WITH, "run": {"name": "mine", "dir": "where it was"}}), 4)
    directory = tmp_path / "run"
    (directory / "checkpoints/step-4").mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return directory


def resumed(*words, resume=NEWEST):
    return configuration(["run.dir=run", *words], resume)


def changes(run, *words):
    """What differs from the run's own configuration, as dotted keys."""
    before, after = read_config(run / "config.yaml").to_dict(), resumed(*words).to_dict()
    return {
        f"{section}.{key}": value
        for section, fields in after.items()
        for key, value in fields.items()
        if value != before[section][key]
    }


BY_ITSELF = {"run.dir": "run", "parallel.dp_shard": -1}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["train.steps=40"], {"train.steps": 40}),
        (["optim.lr=3e-3"], {"optim.lr": 3e-3}),  # the default, but said
        (["attention.window=null"], {"attention.window": None}),
        (["model=small", "comm=gloo", "optim=adamw", "attention=burst"], {}),  # the run has them
        (["model=tiny"], {"model.name": "tiny", "model.layers": 4, "model.rope_theta": 1e4}),
        # What only the earlier strategy read is forgotten; what tokens see is not.
        (["attention=ring"], {"attention.strategy": "ring", "attention.inner_ring": None}),
        (["attention.strategy=gather"], {"attention.strategy": "gather", "attention.inner_ring": None}),
        (["optim.schedule=constant"], {"optim.schedule": "constant", "optim.decay_steps": None}),
        (["parallel.dp_shard=2"], {"parallel.dp_shard": 2}),
        (["parallel.sp=4", "parallel.tp=2"], {"parallel.sp": 4, "parallel.tp": 2}),
        (["comm=sim", "parallel.dp_shard=2"], {"comm.backend": "sim", "comm.timeout_seconds": 120.0}),
        (["logger=none"], {"logger.progress": False, "logger.wandb": "disabled", "logger.report": False}),
    ],
)
def test_overrides_and_groups_apply_on_top_of_what_the_run_has(run, words, changed):
    found = {**BY_ITSELF, **changes(run, *words)}
    for key, value in changed.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(resumed(*words), section), name) == value
    others = {key for key in found if key.partition(".")[0] != "model"} - set(BY_ITSELF) - set(changed)
    assert others <= {"logger.memory"}, others


def test_simulated_ranks_stay_as_many_as_they_were_and_processes_decide_by_their_number(run):
    assert resumed("comm=sim").parallel.dp_shard == 2
    assert resolve(resumed(), 8).parallel.dp_shard == 4


def test_a_recipe_is_said_too(run):
    assert resumed("recipe=demo").train.steps == 240
    assert resumed("recipe=demo", "train.steps=5").train.steps == 5


def test_data_are_found_from_another_folder(run, tmp_path, monkeypatch):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": "text", "path": "corpus"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"working_directory": str(tmp_path)}))
    (tmp_path / "corpus").mkdir()
    assert resumed().data.path == "corpus"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    there = ["run.dir=../run"]
    assert configuration(there, Resume()).data.path == str(tmp_path / "corpus")
    assert configuration([*there, "data.path=moved"], Resume()).data.path == "moved"


@pytest.mark.parametrize(
    ("text", "words"),
    [("train: {steps: 3", "run/config.yaml is not plain YAML"), ("train: {stps: 3}", "run/config.yaml: unknown")],
)
def test_a_damaged_base_is_refused_by_name(run, text, words):
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        resumed()


def test_there_must_be_something_to_resume(run):
    (run / "config.yaml").unlink()
    with pytest.raises(StorageError, match=r"run/config\.yaml is missing"):
        resumed()
    with pytest.raises(StorageError, match=r"run\.dir=nowhere"):
        configuration(["run.dir=nowhere"], Resume())
    for resume in (Resume(), Resume(required=False)):
        with pytest.raises(UsageError, match=f"{resume.words[0]} needs the run .* run.dir="):
            configuration([], resume)


def test_a_start_for_want_of_a_checkpoint_knows_only_the_command(run):
    automatic = Resume(required=False)
    assert resumed(resume=automatic).train.seed == 3
    (run / "checkpoints/step-4").rmdir()
    assert resumed(resume=automatic).train.seed == 0


def test_the_shorthand_is_what_it_stands_for():
    assert spelled_out(["--resume", "a=1"]) == ["--resume", "a=1"]
    for directory in ("runs/a", "runs/a b", "it's", "a=b,c", "back\\", "back\\'", "[x]"):
        option, word = spelled_out([f"--resume={directory}"])
        assert option == "--resume"
        assert configuration([word], None).run.dir == directory
    for words in (["--resume="], ["--resume=a", "run.dir=b"]):
        with pytest.raises(UsageError):
            spelled_out(words)


def test_options_that_contradict_one_another_end_with_2(run, capsys):
    from longctx.launcher.cli import main

    for words in (["--resume", "--auto-resume"], ["--step", "3"], ["--resume", "--step", "-3"], ["--resume"]):
        assert main(["train", *words]) == 2
    assert Path("run").is_dir()
