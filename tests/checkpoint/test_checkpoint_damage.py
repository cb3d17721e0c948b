"""Every damaged byte is noticed, the file is named, and the run goes on from the newest intact checkpoint."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil

import pytest
import torch

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.errors import StorageError
from longctx.sim import RankFailed
from tests.checkpoint.checkpoint_run import digest, make, on_cluster, saved, train


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Steps 1 and 2 of a lone process."""
    directory = tmp_path_factory.mktemp("damage") / "checkpoints"
    return directory, saved(directory, 2)


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "run")
    return tmp_path / "run", original[1]


def refused(directory, named, step=2, earlier="step 1"):
    """Loading ``step`` fails, names the file and the way out, and leaves the run as it was."""
    state = make(None, seed=5)
    before = digest(state)
    with pytest.raises(StorageError) as caught:
        Checkpointer(directory).load(state, step)
    assert named in str(caught.value)
    assert str(caught.value).endswith(f"newest intact earlier one: {earlier}")
    assert digest(state).same(before)


def falls_back(directory, expected):
    state = make(None, seed=5)
    assert Checkpointer(directory).load(state) == 1
    assert digest(state).same(expected)


def test_one_hundred_flipped_bits(run):
    directory, (first, _) = run
    generator = random.Random(0)
    files = sorted((directory / "step-2").iterdir())
    for number in range(100):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        refused(directory, path.name if path.name != "commit.json" else "step-2/")
        if number % 10 == 0:
            falls_back(directory, first)
        path.write_bytes(whole)
    assert Checkpointer(directory).newest() == 2


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "state.json", "commit.json"])
def test_truncated_extended_and_missing_files(run, name):
    directory, (first, _) = run
    path = directory / "step-2" / name
    whole = path.read_bytes()
    for damaged in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0", whole + whole):
        path.write_bytes(damaged)
        refused(directory, name)
    path.unlink()
    refused(directory, name)
    falls_back(directory, first)


def test_files_of_another_step_and_swapped_files(run):
    directory, (first, _) = run
    for name in ("rank-00000.safetensors", "state.json"):
        kept = (directory / "step-2" / name).read_bytes()
        shutil.copy(directory / "step-1" / name, directory / "step-2" / name)
        refused(directory, name)
        (directory / "step-2" / name).write_bytes(kept)
    shutil.copy(directory / "step-1" / "commit.json", directory / "step-2" / "commit.json")
    refused(directory, "written for step 1")
    falls_back(directory, first)


def test_a_renamed_step_is_not_that_step(run):
    directory, _ = run
    shutil.move(directory / "step-2", directory / "step-3")
    refused(directory, "written for step 2", step=3)


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.mark.parametrize(
    "name", ["rank-00000.safetensors", "rank-00000.json", "state.json", "commit.json", ".metadata"]
)
def test_a_pickle_is_never_executed(run, tmp_path, name):
    directory, (_, second) = run
    (directory / "step-2" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    if name == ".metadata":
        state = make(None)
        assert Checkpointer(directory).load(state) == 2
        assert digest(state).same(second)
    else:
        refused(directory, name)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "commit.json"])
def test_links_and_devices_are_not_followed(run, tmp_path, name):
    directory, _ = run
    path = directory / "step-2" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(directory, name)
    path.unlink()
    os.mkfifo(path)
    refused(directory, name)


def test_a_checkpoint_behind_a_link_does_not_count(run, tmp_path):
    directory, _ = run
    (directory / "step-2").rename(tmp_path / "step-2")
    (directory / "step-2").symlink_to(tmp_path / "step-2")
    assert Checkpointer(directory).newest() == 1
    state = make(None)
    train(state, 2)
    Checkpointer(directory, keep=1).save(2, state)
    assert not (directory / "step-2").is_symlink()
    assert len(list((tmp_path / "step-2").iterdir())) == 4


def test_damage_after_a_look_is_noticed(run):
    directory, _ = run
    checkpointer = Checkpointer(directory)
    assert checkpointer.newest() == 2
    path = directory / "step-2" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert checkpointer.newest() == 1


def test_starting_over_is_no_answer_to_damage(run):
    directory, _ = run
    for step in (1, 2):
        (directory / f"step-{step}" / "state.json").unlink()
    with pytest.raises(StorageError, match=r"none of 2 checkpoints in .* is intact; newest: .*step-2/state.json"):
        Checkpointer(directory).newest()


def save_two(shape, directory):
    state = make(shape)
    checkpointer = Checkpointer(directory, keep=0)
    for step in (1, 2):
        state.loader.position = step
        checkpointer.save(step, state)


def load_any(shape, directory, step=None):
    state = make(shape)
    return Checkpointer(directory).load(state, step), state.loader.position


def test_all_ranks_take_the_newest_that_is_intact_for_all(tmp_path, caplog):
    on_cluster("2", save_two, tmp_path)
    damaged = tmp_path / "step-2" / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    for name in ("2", "4"):
        with caplog.at_level(logging.WARNING):
            assert set(on_cluster(name, load_any, tmp_path)) == {(1, 1)}
        assert "step 2 is left out" in caplog.text and "rank-00001.safetensors is damaged" in caplog.text
    with pytest.raises(RankFailed, match=r"cannot load step 2: rank \d: .*rank-00001.safetensors is damaged"):
        on_cluster("2", load_any, tmp_path, 2)


def test_two_ranks_that_swapped_files(tmp_path):
    on_cluster("2", save_two, tmp_path)
    for kind in ("safetensors", "json"):
        one, two = (tmp_path / "step-2" / f"rank-0000{rank}.{kind}" for rank in (0, 1))
        data = one.read_bytes(), two.read_bytes()
        one.write_bytes(data[1])
        two.write_bytes(data[0])
    refused(tmp_path, "rank-0000")


def see_other_directories(shape, directory):
    rank = torch.distributed.get_rank()
    checkpointer = Checkpointer(directory / f"host-{rank}")
    return checkpointer.newest()


def test_ranks_with_different_views_agree_or_refuse(original, tmp_path, caplog):
    for rank in range(2):
        shutil.copytree(original[0], tmp_path / f"host-{rank}")
    assert on_cluster("2", see_other_directories, tmp_path) == [2, 2]
    shutil.rmtree(tmp_path / "host-1" / "step-2")
    with caplog.at_level(logging.WARNING):
        assert on_cluster("2", see_other_directories, tmp_path) == [1, 1]
    assert "ranks see different checkpoints" in caplog.text and "[[1, 2], [1]]" in caplog.text
    shutil.rmtree(tmp_path / "host-1")
    saved(tmp_path / "host-1", 3)
    shutil.rmtree(tmp_path / "host-1" / "step-3")
    state = make(None)
    train(state, 5)
    for step in (1, 2):
        Checkpointer(tmp_path / "host-1").save(step, state)
    with pytest.raises(RankFailed, match=r"commit.json differs between ranks"):
        on_cluster("2", see_other_directories, tmp_path)


def test_only_exact_names_count(run):
    directory, _ = run
    for name in ("old-step-999", "step-10.tmp", "step-010", "step--1", "step-1_0", "Step-11", "step-", "step-１２"):
        shutil.copytree(directory / "step-2", directory / name)
    (directory / "step-12").write_text("a file")
    (directory / ".partial-step-13").mkdir()
    (directory / ".trash-0123456789abcdef").mkdir()
    assert CheckpointDirectory(directory).steps() == [1, 2]
    Checkpointer(directory, keep=1).save(3, make(None))
    left = {path.name for path in directory.iterdir()}
    assert "step-3" in left and {"step-1", "step-2", ".partial-step-13", ".trash-0123456789abcdef"}.isdisjoint(left)
    assert {"old-step-999", "step-010", "step-12"} <= left


def test_retention_keeps_the_newest_and_never_what_was_just_saved(tmp_path, caplog):
    state = make(None)
    for keep, left in ((2, [8, 9]), (0, list(range(10))), (1, [9])):
        directory = tmp_path / str(keep)
        for step in range(10):
            Checkpointer(directory, keep).save(step, state)
        assert CheckpointDirectory(directory).steps() == left
    with caplog.at_level(logging.WARNING):
        Checkpointer(tmp_path / "2", keep=1).save(5, state)
    assert CheckpointDirectory(tmp_path / "2").steps() == [5, 8, 9]
    assert "step-8, step-9 lie ahead of step 5" in caplog.text


def test_only_the_user_may_read(run):
    directory, _ = run
    saved(directory.parent / "fresh", 1)
    for path in [directory.parent / "fresh", *(directory.parent / "fresh").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_deleting_follows_no_link(run, tmp_path):
    directory, _ = run
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (directory / "step-1" / "link").symlink_to(tmp_path / "precious")
    Checkpointer(directory, keep=1).save(3, make(None))
    assert CheckpointDirectory(directory).steps() == [3]
    assert (tmp_path / "precious" / "file").read_text() == "kept"
