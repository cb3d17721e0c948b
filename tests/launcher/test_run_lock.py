"""One directory, one live process: who holds it is named, and only its end lets another in."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from longctx.errors import StorageError
from longctx.launcher.rundir.lock import LAUNCHER, WRITER, Holder, launching, writing

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from longctx.launcher.rundir.lock import launching, writing
kind, directory = sys.argv[1:]
lock = launching if kind == "launching" else lambda folder: writing(folder, launched=kind == "launched")
with lock(Path(directory)):
    child = subprocess.Popen(["sleep", "60"], close_fds=False)  # inherits all that can be inherited
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold a directory, each with a child; ends them all."""
    started, children = [], []

    def start(kind):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, kind, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        children.append(int(process.stdout.readline()))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    for child in children:
        os.kill(child, signal.SIGKILL)


def is_free(lock, directory, **options):
    try:
        with lock(directory, **options):
            return True
    except StorageError:
        return False


def test_the_holder_is_named_while_it_lives_and_however_it_ends_the_next_comes_in(tmp_path, holder):
    process = holder("writing")
    process.send_signal(signal.SIGSTOP)
    for lock in (writing, launching):
        with pytest.raises(StorageError) as refused, lock(tmp_path):
            pass
        told = str(refused.value)
        assert f"process {process.pid} on {platform.node()} since 20" in told and "another run.dir" in told
        assert refused.value.exit_code == 74
    process.kill()
    process.wait()
    # Its child lives on.
    assert is_free(writing, tmp_path) and is_free(launching, tmp_path)


def test_a_command_and_its_rank_hold_it_together_and_each_alone(tmp_path, holder):
    command = holder("launching")
    assert not is_free(launching, tmp_path) and not is_free(writing, tmp_path)
    rank = holder("launched")
    command.kill()
    command.wait()
    assert not is_free(launching, tmp_path) and not is_free(writing, tmp_path), "a rank outlived its command"
    rank.kill()
    rank.wait()
    assert is_free(launching, tmp_path) and is_free(writing, tmp_path)


def test_a_file_that_was_removed_is_no_lock(tmp_path, holder):
    """The way out for a lock that a dead machine's file server never frees."""
    holder("writing")
    for name in (LAUNCHER, WRITER):
        (tmp_path / name).unlink()
    assert is_free(writing, tmp_path)


def locks_fail(monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_names_keep_out_what_lives_on_this_machine(tmp_path, monkeypatch, caplog, number):
    locks_fail(monkeypatch, number)
    with writing(tmp_path):
        assert "without locks" in caplog.text
        assert not is_free(writing, tmp_path) and not is_free(launching, tmp_path)
    assert is_free(writing, tmp_path), "its orderly end took the name away"
    here = Holder.this_process()
    for other, free in (
        (here, False),
        (replace(here, birth="another boot 17"), True),
        (replace(here, pid=2**22 + 1), True),
        (replace(here, host="elsewhere"), True),
    ):
        (tmp_path / WRITER).write_text(json.dumps(asdict(other)))
        assert is_free(writing, tmp_path) == free, other
    (tmp_path / WRITER).write_text("[" * 10_000)
    assert is_free(writing, tmp_path), "a damaged name is no name"


def test_other_troubles_are_told(tmp_path, monkeypatch):
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / LAUNCHER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot be written"), writing(tmp_path / "link"):
        pass
    assert not (tmp_path / "elsewhere").exists()
    locks_fail(monkeypatch, errno.EIO)
    with pytest.raises(StorageError, match="cannot be locked"), writing(tmp_path):
        pass


def test_a_requeued_job_waits_for_the_lock_of_its_dead_node(tmp_path, monkeypatch, holder):
    process = holder("writing")
    elsewhere = replace(Holder.this_process(), host="node-1", job="17", pid=process.pid)
    (tmp_path / LAUNCHER).write_text(json.dumps(asdict(elsewhere)))
    assert not is_free(writing, tmp_path), "it is not this job's"
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def the_lease_ends(_):
        process.kill()
        process.wait()

    monkeypatch.setattr("longctx.launcher.rundir.lock.time.sleep", the_lease_ends)
    assert is_free(writing, tmp_path)


def test_a_dead_machine_s_lock_is_told_with_the_way_out(tmp_path, holder):
    holder("writing")
    (tmp_path / LAUNCHER).write_text(json.dumps(asdict(replace(Holder.this_process(), host="node-1"))))
    with (
        pytest.raises(StorageError, match=f"if node-1 is gone for good, remove {tmp_path}/{LAUNCHER}"),
        writing(tmp_path),
    ):
        pass


def test_passwords_stay_out_of_the_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/longctx", "train", "data.path=https://me:secret@host/a b"])
    assert Holder.this_process().command == "longctx train 'data.path=https://***@host/a b'"
