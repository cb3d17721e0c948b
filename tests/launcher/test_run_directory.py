"""A directory holds one run: its name and its record; config.yaml is data, written whole and read strictly."""

import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longctx.config import Config
from longctx.errors import ConfigError, LongctxError, StorageError
from longctx.launcher import run_directory
from longctx.launcher.run_directory import (
    claimed,
    directory_of,
    open_directory,
    read_config,
    refuse_occupied,
    with_directory,
)


def at(directory, **train):
    return Config.from_dict({"run": {"dir": str(directory)}, "train": train})


def opened(config, step=None):
    with claimed(config) as config:
        return open_directory(config, step)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith(".lock"))


def test_what_is_written_is_read_back(tmp_path):
    mapping = {
        "run": {"dir": str(tmp_path / "a"), "name": "$(touch x): é #"},
        "optim": {"eps": 1e-12, "lr": 1},
    }
    config = Config.from_dict(mapping)
    directory = opened(config)
    assert read_config(directory / "config.yaml") == config
    assert names(directory) == ["config.yaml"]


def test_directories_that_are_named_within_a_second_are_different_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As another machine sees it: the name is free when it is chosen, and taken when it is made.
    monkeypatch.setattr(run_directory, "directory_by_the_clock", lambda: Path("runs") / next(stamps))
    stamps = iter(["1", "1", "2"])
    with claimed(Config()) as one, claimed(Config()) as other:
        open_directory(one, None)
        open_directory(other, None)
    assert (one.run.dir, other.run.dir) == ("runs/1", "runs/2")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: directory_of(run_directory._made(Config())[0]), range(24)))
    assert len(set(made)) == 24
    assert with_directory(Config(), "17").run.dir == "runs/job-17"


def test_a_directory_that_got_nothing_is_removed_again_if_it_was_made_here(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(ConfigError), claimed(at(tmp_path / name)):
            raise ConfigError("refused")
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    "left", ["config.yaml", "metrics.jsonl", "environment.json", "failures/rank-0.json", "checkpoints/step-4/x"]
)
def test_whatever_is_left_of_a_run_keeps_another_from_starting_there(tmp_path, left):
    (tmp_path / "failures").mkdir()  # an empty folder holds nothing
    (tmp_path / "notes.txt").write_text("mine")
    refuse_occupied(at(tmp_path))
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(ConfigError) as refused:
        refuse_occupied(at(tmp_path))
    for word in ("--resume", "--auto-resume", "another run.dir", "step-4" if "step-4" in left else left.split("/")[0]):
        assert word in str(refused.value)


def test_attempts_that_left_no_checkpoint_are_kept_side_by_side(tmp_path):
    for attempt in range(3):
        opened(at(tmp_path, seed=attempt))
        (tmp_path / "metrics.jsonl").write_text(f"attempt {attempt}")
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures/rank-0.json").write_text("why")
    opened(at(tmp_path, seed=3))
    for attempt in range(3):
        assert (tmp_path / f"metrics.attempt-{attempt + 1}.jsonl").read_text() == f"attempt {attempt}"
        assert read_config(tmp_path / f"config.attempt-{attempt + 1}.yaml").train.seed == attempt
    assert (tmp_path / "failures.attempt-3/rank-0.json").read_text() == "why"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_resume_keeps_the_configuration_that_it_changes(tmp_path):
    opened(at(tmp_path, seed=0))
    (tmp_path / "environment.json").write_text("first")
    (tmp_path / "metrics.jsonl").write_text("goes on")
    for seed in (1, 1, 2, 3):
        opened(at(tmp_path, seed=seed), step=4)
    kept = [read_config(tmp_path / f"config.before-step-4{end}.yaml").train.seed for end in ("", "-2", "-3")]
    assert kept == [0, 1, 2]
    assert not (tmp_path / "config.before-step-4-4.yaml").exists()
    assert read_config(tmp_path / "config.yaml").train.seed == 3
    assert (tmp_path / "environment.before-step-4.json").read_text() == "first"
    assert (tmp_path / "metrics.jsonl").read_text() == "goes on"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "a key stands twice"),
        ("train: &a\n  steps: 1\nrun: *a\n", "aliases are not allowed"),
        ("run: !!python/object/apply:os.system ['touch canary']\n", "not plain YAML"),
        ("train: [1\n", "not plain YAML"),
        ("[" * 10_000, "not plain YAML"),
        ("", "must be a mapping"),
        ("train:\n  stps: 1\n", "did you mean train.steps?"),
        ("? [a, b]\n: 1\n", ""),
    ],
)
def test_anything_but_plain_data_is_refused(text, words, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_config(file)
    assert words in str(refused.value) and str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("canary").exists()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StorageError, match=r"config\.yaml cannot be read"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "latin").write_bytes(b"run:\n  name: \xe9\n")
    with pytest.raises(LongctxError):
        read_config(tmp_path / "latin")
    (tmp_path / "large").write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(ConfigError, match="at most 1 MiB"):
        read_config(tmp_path / "large")


def test_what_a_run_writes_is_its_user_s_alone(tmp_path):
    before = os.umask(0o022)
    try:
        with claimed(Config.from_dict({"run": {"dir": str(tmp_path / "shared/run")}})) as config:
            directory = open_directory(config, None)
            (directory / "wandb").mkdir()
            subprocess.run(["touch", directory / "of-another-process"], check=True)
        (tmp_path / "later").touch()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.iterdir())}
    assert modes.keys() >= {"run", "config.yaml", "wandb", "of-another-process"}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "later").stat().st_mode) == 0o644
