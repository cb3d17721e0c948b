"""``longctx launch`` with real processes as ranks that do not train: who is told what, and the exit code."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import longctx
from longctx.launcher.ranks.supervisor import Exit, RanksEnd, cause_of

FAKE = Path(__file__).parent / "fake_build"


def start(folder, name, *extra):
    command = [sys.executable, "-m", "longctx.launcher.cli", "launch", "--nproc", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{FAKE}{os.pathsep}{Path(longctx.__file__).parents[1]}"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [*command, f"run.dir={folder}/run", f"run.name={name}", "parallel.sp=2", *extra],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a process group of its own, as a terminal gives to each command
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_ranks(folder):
    deadline = time.monotonic() + 60
    while not all((folder / f"run/ready-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)


@pytest.mark.gloo
def test_ranks_read_one_resolved_configuration(tmp_path):
    status, out, err = finish(start(tmp_path, "fine", "--auto-resume"))
    assert (status, err) == (0, "")
    first, *told, last = out.splitlines()
    assert first == f"run directory: {tmp_path}/run" and last == "starting 2 processes"
    assert [line.split(" ")[0] for line in told] == ["loading", "configuration"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in range(2):
        assert (tmp_path / f"run/started-{rank}").read_text() == f"2 True {threads}"
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    degrees = {"dp_replicate": 1, "dp_shard": 1, "sp": 2, "tp": 1, "pp": 1}
    assert written["parallel"] == {**degrees, "pp_schedule": "1f1b", "pp_virtual": None}


@pytest.mark.gloo
def test_a_rank_s_error_is_told_once_with_its_exit_code(tmp_path):
    status, _, err = finish(start(tmp_path, "data-on-rank-1"))
    assert status == 65
    assert err == "longctx: corpus.bin: document 5 is truncated\n"
    assert not (tmp_path / "run/slept").exists(), "the other rank was not ended"


@pytest.mark.gloo
def test_a_crash_shows_the_first_traceback_alone(tmp_path):
    status, _, err = finish(start(tmp_path, "crash-on-rank-0"))
    assert status == 70
    assert err.count("Traceback") == 1
    told = rf"longctx: rank 0 \(process \d+ on {platform.node()}\) crashed: ZeroDivisionError: a bug\n"
    assert re.search(told + r"\Z", err)


RESUME = "; --resume goes on from the newest checkpoint\n"
MEMORY = "; the machine may have run out of memory"


@pytest.mark.gloo
def test_a_killed_rank_is_named_and_not_the_one_that_lost_its_peer(tmp_path):
    status, _, err = finish(start(tmp_path, "killed-rank-1-SIGKILL"))
    assert status == 70
    assert err == "longctx: rank 1 was killed by SIGKILL" + MEMORY + RESUME


@pytest.mark.parametrize(
    ("exits", "told"),
    [
        ([(0, 0), (1, 0)], (0, None, False)),
        ([(1, -signal.SIGSEGV), (0, 70)], (70, "rank 1 was killed by SIGSEGV" + RESUME.strip(), True)),
        # Whoever lost its peer may be seen first.
        ([(0, 70), (1, -signal.SIGKILL)], (70, "rank 1 was killed by SIGKILL" + MEMORY + RESUME.strip(), True)),
        ([(2, 0), (0, 65), (1, 70)], (65, "rank 0 ended with status 65 and left no message", False)),
        # NCCL aborts a rank after it lost its peer: what the peer left comes first.
        ([(1, -signal.SIGABRT)], (70, "rank 1 was killed by SIGABRT" + RESUME.strip(), False)),
    ],
)
def test_the_exits_of_ranks_tell_who_was_killed(exits, told):
    assert cause_of([Exit(*each) for each in exits]) == RanksEnd(*told)


@pytest.mark.gloo
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_the_ranks_and_requeue_is_the_answer(tmp_path, number):
    process = start(tmp_path, "wait")
    wait_for_ranks(tmp_path)
    os.killpg(process.pid, number)  # as a terminal does with Ctrl-C, and Slurm with a step
    status, _, err = finish(process)
    assert status == 75
    assert err == "longctx: stopped at step 7; checkpoint step-7 is committed\n"


def test_bad_data_are_refused_before_a_process_starts(tmp_path):
    status, _, err = finish(start(tmp_path, "bad-data"))
    assert status == 65
    assert err.startswith("longctx: corpus.bin: document 3, offset 17")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
