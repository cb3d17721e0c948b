"""A save may end at any operation on disk, by an error or by the process's death: nothing committed is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.errors import StorageError
from longctx.sim import Cluster, RankFailed
from tests.checkpoint.checkpoint_run import digest, make, saved, train

CHANGING = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing after this operation happens."""


class Disk:
    """Counts the operations below ``root`` that change it, and breaks at one of them.

    Args:
        kind: "error" fails one operation, "broken" fails it and all after it, "kill" ends the process there
            and takes with it what was written to files and never synced.
    """

    def __init__(self, root: Path, kind: str = "", at: int = -1) -> None:
        self.root, self.kind, self.at, self.count = root, kind, at, 0
        self.files: dict[int, str] = {}
        self.unsynced: set[str] = set()

    @contextlib.contextmanager
    def installed(self):
        real = {name: getattr(os, name) for name in CHANGING}
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGING:
                patch.setattr(os, name, self._watched(name, real[name]))
            yield self
        if self.kind == "kill":
            for path in self.unsynced:
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(path, 0)

    def _watched(self, name, call):
        def wrapped(target, *args, **kwargs):
            writes = name != "open" or (args and args[0] & os.O_CREAT)
            ours = target in self.files if isinstance(target, int) else str(target).startswith(str(self.root))
            if not (ours and writes):
                result = call(target, *args, **kwargs)
                if name == "open":
                    self.files[result] = str(target)  # its number may have been another file's
                return result
            number, self.count = self.count, self.count + 1
            if number == self.at or (number > self.at >= 0 and self.kind in ("broken", "kill")):
                if self.kind == "kill":
                    raise Killed
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = call(target, *args, **kwargs)
            self._remember(name, target, args, result)
            return result

        return wrapped

    def _remember(self, name, target, args, result):
        if name == "open":
            self.files[result] = str(target)
            self.unsynced.add(str(target))
        elif name == "fsync":
            self.unsynced.discard(self.files[target])
        elif name == "rename" and Path(args[0]).name.startswith("step-"):
            moved = [path for path in self.unsynced if path.startswith(f"{target}/")]
            assert not moved, f"{moved} put in place before they were synced"


def rewind_and_save(step, directory, again):
    """From ``step``, one more training step, saved as ``again``."""
    state = make(None)
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.load(state, step)
    train(state, 1)
    message = None
    try:
        checkpointer.save(again, state)
    except StorageError as error:
        message = str(error)
    return message, digest(state)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two committed checkpoints, what they hold, and what saving on from the second comes to."""
    directory = tmp_path_factory.mktemp("crash") / "checkpoints"
    return directory, saved(directory, 2)


def attempt(source, tmp_path, again, kind, at, world=1):
    """Tries the save on a copy with a disk that breaks; the copy, what was said, and whether it broke at all."""
    directory = tmp_path / "copy"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    disk = Disk(directory, kind, at)
    message = None
    try:
        with disk.installed():
            if world == 1:
                message, _ = rewind_and_save(2, directory, again)
            else:
                message = Cluster(world).run(rewind_and_save, 2, directory, again)[0][0]
    except Killed:
        pass
    except RankFailed as failure:
        if not isinstance(failure.__cause__, Killed):
            raise
    return directory, message, disk.count > at


def loaded(directory):
    state = make(None, seed=99)
    return Checkpointer(directory).load(state), digest(state)


@pytest.mark.parametrize(
    ("kind", "again"), [("error", 3), ("kill", 3), ("broken", 2), ("kill", 2)], ids=lambda value: str(value)
)
def test_every_operation_may_be_the_last(run, tmp_path, again, kind):
    source, (_, before) = run
    after = rewound(source, tmp_path)
    at, struck, outcomes = 0, True, set()
    while struck:
        directory, message, struck = attempt(source, tmp_path, again, kind, at)
        step, found = loaded(directory)
        after.plain = (*after.plain[:2], step)
        outcomes.add("new" if found.same(after) else "old")
        assert (step == again and found.same(after)) or (step == 2 and found.same(before)), f"operation {at}"
        if message is None and kind != "kill":
            assert found.same(after), f"operation {at}: success was claimed"
        elif message is not None:
            assert "No space left on device" in message and "earlier ones are intact" in message
        if at % 4 == 0:
            # Whatever was left behind is cleared by the next save, and no name of ours stays.
            Checkpointer(directory, keep=1).save(9, make(None))
            assert [path.name for path in directory.iterdir()] == ["step-9"], f"operation {at}"
        at += 1
    assert at > 15
    assert outcomes == {"old", "new"}


def rewound(source, tmp_path):
    directory = tmp_path / "whole"
    shutil.copytree(source, directory)
    return rewind_and_save(2, directory, 3)[1]


@pytest.mark.parametrize("kind", ["error", "kill"])
def test_several_ranks_fail_together(run, tmp_path, kind):
    source, (_, before) = run
    for at in range(0, 60, 2):
        directory, message, struck = attempt(source, tmp_path, 3, kind, at, world=2)
        step, found = loaded(directory)
        assert step in (2, 3), f"operation {at}"
        if step == 2:
            assert found.same(before)
        if message is not None:
            assert message.startswith("step 3 was not saved") and step == 2
        if not struck:
            break


def test_the_state_can_be_saved_again_once_there_is_space(run, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(run[0], directory)
    state = make(None)
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.load(state)
    train(state, 1)
    with Disk(directory, "broken", 2).installed(), pytest.raises(StorageError):
        checkpointer.save(3, state)
    checkpointer.save(3, state)
    assert loaded(directory)[1].same(digest(state))
    assert sorted(p.name for p in directory.iterdir()) == ["step-2", "step-3"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot prepare a checkpoint in .*file/checkpoints: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints").save(1, make(None))
