"""What a run of two real processes loses by each kind of kill at a random moment; and that it goes on bit for bit.

``KILLS=20 pytest -m matrix -s tests/launcher/test_lost_by_kills.py`` prints the table.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("KILLS", "3"))
STEPS, EVERY = 30, 10
TINY = [
    *("model=tiny", "model.layers=2", "data.seq_len=256", "data.max_documents=40", "parallel.sp=2", "logger=none"),
    *("train.canary=false", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=0"),
]
# A step that takes long, in a process that is asked for it.
LONG = """
import os, time
step = int(os.environ.get("LONG_STEP", "0"))
if step:
    from longctx.engines.native import NativeEngine
    taken, inner = [0], NativeEngine.accumulate
    def accumulate(self, *arguments):
        taken[0] += 1
        if taken[0] == step:
            print("long step", flush=True)
            time.sleep(600)
        return inner(self, *arguments)
    NativeEngine.accumulate = accumulate
"""


def start(directory, *words, log, **environment):
    command = [sys.executable, "-m", "longctx.launcher.cli", "launch", "--nproc", "2", *words]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([environment.pop("SITE", root), root])
    return subprocess.Popen(
        [*command, *TINY, f"run.dir={directory}"],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
    )


def done(directory):
    try:
        return sum(line.endswith(b"}\n") for line in (directory / "metrics.jsonl").open("rb"))
    except OSError:
        return 0


def committed(directory):
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("checkpoints/step-*"))


def state(directory):
    return {file.name: file.read_bytes() for file in (directory / f"checkpoints/step-{STEPS}").glob("rank-*")}


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def killed(directory, log, kind, moment):
    """Kills one run some seconds after its first step; what it lost, how long it took to end, and its exit code."""
    process = start(directory, log=log)
    assert wait_for(lambda: done(directory) > 0, process)
    time.sleep(moment)
    if process.poll() is not None:
        return None
    began = time.monotonic()
    process.send_signal(kind)
    status = process.wait(120)
    if done(directory) == STEPS:
        return None  # it came in the last step, and found the run done
    seconds, steps, saved = time.monotonic() - began, done(directory), max(committed(directory), default=0)
    return steps - saved, seconds, status


@pytest.mark.matrix
@pytest.mark.gloo
def test_what_is_lost_by_a_kill_at_a_random_moment(tmp_path):
    whole, log, draw = tmp_path / "whole", tmp_path / "log", random.Random(14)
    started = time.monotonic()
    process = start(whole, log=log)
    assert wait_for(lambda: done(whole) > 0, process)
    first = time.monotonic()
    assert process.wait(300) == 0, log.read_text()
    print(f"\nfirst step after {first - started:.1f} s, {STEPS - 1} more in {time.monotonic() - first:.1f} s")
    print("signal   kills  steps lost: mean, most   torn bytes   seconds to the end: mean, most   exits")
    length = time.monotonic() - first
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        told = []
        for number in range(KILLS):
            directory = tmp_path / f"{kind.name}-{number}"
            outcome = killed(directory, log, kind, draw.random() * length * 0.8)
            if outcome is None:
                continue
            records = (directory / "metrics.jsonl").read_bytes()
            told.append((*outcome, len(records) - records.rfind(b"\n") - 1))
            resumed = start(directory, "--auto-resume", log=log)
            assert resumed.wait(300) == 0, log.read_text()
            assert state(directory) == state(whole)
            assert [json.loads(line)["step"] for line in (directory / "metrics.jsonl").open()] == [*range(1, STEPS + 1)]
            shutil.rmtree(directory)
        lost, seconds, exits, torn = zip(*told)
        if kind != signal.SIGKILL:
            assert (set(exits), set(lost)) == ({75}, {0})
        assert max(lost) < EVERY + 2
        print(
            f"{kind.name:8} {len(told):5}  {sum(lost) / len(lost):5.1f}, {max(lost):<17} {max(torn):<22} "
            f"{sum(seconds) / len(seconds):5.1f}, {max(seconds):<13.1f} {sorted(set(exits))}"
        )


@pytest.mark.matrix
@pytest.mark.gloo
def test_a_step_of_minutes_on_real_processes_is_dropped_within_seconds(tmp_path):
    directory, log, site = tmp_path / "run", tmp_path / "log", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n    exec({LONG!r})\n")
    process = start(directory, log=log, SITE=str(site), LONG_STEP="5")
    assert wait_for(lambda: log.read_text().count("long step") == 2, process), log.read_text()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: committed(directory) == [4], process)
    saved = time.monotonic() - began
    assert process.wait(60) == 75, log.read_text()
    print(f"\nsaved {saved:.1f} s after the signal, ended after {time.monotonic() - began:.1f} s")
    assert saved < 15
    resumed = start(directory, "--resume", log=log)
    assert resumed.wait(300) == 0, log.read_text()
    whole = tmp_path / "whole"
    assert start(whole, log=log).wait(300) == 0
    assert state(directory) == state(whole)
