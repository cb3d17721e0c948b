"""Processes of one job without torch or a process group: whose words are told, and who is ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.errors import ConfigError, DataError, NumericsError
from longctx.launcher import processes
from longctx.launcher.failures import error_of, first_failure
from longctx.launcher.processes import Workers, as_rank, run_gloo

ROOT = Path(__file__).parents[2]

# Rank 0 ends only after rank 1 has gone, or when it is ended itself.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
how, folder, rank = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if rank == 1:
    (folder / "started").touch()
    print("noise\\nthe cause", file=sys.stderr)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "refused":
        from longctx.errors import DataError
        from longctx.launcher.failures import record
        sys.exit(record(rank, folder / "failures", DataError("x.bin is damaged")))
    sys.exit(3 if how == "failed" else 0)
if how != "fine":
    (folder / "process").write_text(str(os.getpid()))
    time.sleep(100)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "a_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def job(how, limit=60.0):
        run_gloo("a_rank", json.dumps(how), 2, tmp_path, Workers(limit=limit))

    return job


def test_ranks_that_end_well_are_silent(run, tmp_path, capfd):
    run("fine")
    assert (tmp_path / "started").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "told"),
    [("failed", "rank 1 of a_rank ended with 3: the cause"), ("killed", "rank 1 of a_rank ended with -9: the cause")],
)
def test_the_rank_that_failed_first_is_told_and_the_others_are_ended(run, how, told):
    with pytest.raises(NumericsError, match=f"^{told}$"):
        run(how)


def test_a_rank_s_own_error_is_the_command_s(run, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"^x\.bin is damaged$"):
        run("refused")

    def worker(words):
        raise ConfigError("sp=3")

    (tmp_path / "other" / "failures").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["a_rank", "{}", str(tmp_path / "other"), "1", "2"])
    assert as_rank(worker) == 78
    assert str(error_of(first_failure(tmp_path / "other" / "failures"))) == "sp=3"


def test_ranks_that_take_too_long_are_named_and_ended(run, tmp_path):
    with pytest.raises(NumericsError, match=r"^ranks 0(, 1)? had not ended after 1 s$"):
        run("waits", limit=1)
    process = tmp_path / "process"
    assert not process.exists() or not Path(f"/proc/{process.read_text()}").exists()


class Process:
    """What successive looks at it find, the last one for ever."""

    def __init__(self, *found):
        self.found = list(found)

    def poll(self):
        return self.found.pop(0) if len(self.found) > 1 else self.found[0]


@pytest.mark.parametrize(
    ("looks", "failed", "statuses"),
    [
        ([(0,), (None, 0)], None, [0, 0]),
        ([(None, 0), (None,)], None, [0, None]),  # time is up
        ([(None,), (None, 3)], 1, [None, 3]),
        ([(None, None, 1), (None, 3, 3)], 1, [1, 3]),
        # Whoever lost its peer is seen first, and the killed peer at the next look.
        ([(1,), (None, -9)], 1, [1, -9]),
        # NCCL aborts a rank that has lost its peer: it is no cause.
        ([(None, -6), (1, 1)], 1, [-6, 1]),
    ],
)
def test_of_two_that_end_together_the_cause_is_told(monkeypatch, looks, failed, statuses):
    monkeypatch.setattr(processes, "LOOK", 0)
    monkeypatch.setattr(processes, "SETTLE", 0)
    ends = processes._ends([Process(*found) for found in looks], time.monotonic() + 0.2)
    assert ends == processes.ExitStatuses(statuses, failed)
    assert ends.in_time == (failed is not None or None not in statuses)


# A request to stop arrives when a process has been started and its starter does not know it yet.
STOPPED = """
import json, signal, subprocess, sys
from pathlib import Path
from longctx.launcher import processes
number, folder = int(sys.argv[1]), Path(sys.argv[2])

class Interrupted(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        (folder / f"started-{self.pid}").touch()
        signal.raise_signal(number)

subprocess.Popen = Interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
processes.run_gloo("a_rank", json.dumps("waits"), 2, folder)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_stop_amid_the_start_of_ranks_leaves_none(run, tmp_path, number):
    words = [sys.executable, "-c", STOPPED, str(int(number)), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = subprocess.run(words, env=environment, capture_output=True, timeout=60, check=False)
    assert ended.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    started = [file.name.partition("-")[2] for file in tmp_path.glob("started-*")]
    assert len(started) == 2
    assert not any(Path(f"/proc/{each}").exists() for each in started)
