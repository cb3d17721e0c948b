"""Processes end with whoever started them, however that ended, and whatever they are doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.launcher import env
from longctx.launcher.ranks.store import listen, nameless_file, path_of

ROOT = Path(__file__).parents[2]
RANK = """
import sys, time
from longctx.launcher.ranks import lifeline
lifeline.end_with_launcher(int(sys.argv[1])) if len(sys.argv) > 1 else lifeline.end_with_parent()
print("ready", flush=True)
while True:
    pass
"""

AGENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).pid, flush=True)
time.sleep(60)
"""


def start(*words, **options):
    command = [sys.executable, "-c", RANK, *words]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, **options)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("state", [None, signal.SIGSTOP], ids=["busy", "stopped"])
def test_a_rank_ends_with_the_lifeline_that_its_launcher_held(state):
    end, mine = os.pipe()
    with start(str(end), pass_fds=[end]) as rank:
        os.close(end)
        if state:
            rank.send_signal(state)
        assert rank.poll() is None
        os.close(mine)
        assert rank.wait(10) == -signal.SIGKILL


def test_a_rank_that_starts_after_its_launcher_has_gone_ends_too():
    end, mine = os.pipe()
    os.close(mine)
    command = [sys.executable, "-c", RANK, str(end)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, pass_fds=[end], timeout=20, check=False)
    os.close(end)
    assert done.returncode == -signal.SIGKILL


def test_a_rank_of_another_launcher_ends_with_its_parent():
    command = [sys.executable, "-c", AGENT, RANK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        rank = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        until = time.monotonic() + 10
        while Path(f"/proc/{rank}").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text().split()[2]:
            assert time.monotonic() < until, "the rank outlived its parent"
            time.sleep(0.05)


def test_the_store_of_a_launch_has_no_name_and_opens_again():
    with nameless_file() as file:
        assert os.fstat(file.fileno()).st_nlink == 0
        assert not os.fstat(file.fileno()).st_mode & 0o077
        with Path(path_of(file.fileno())).open("r+b") as again:
            again.write(b"x")
        assert os.fstat(file.fileno()).st_size == 1


def test_rank_0_listens_on_the_interface_that_is_named_alone():
    with listen(env.Address("127.0.0.1", 0, False, "0", True)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    with listen(env.Address("localhost", 0, False, "0", True)) as listening:
        assert listening.getsockname()[0] in ("127.0.0.1", "::1")


def test_ranks_of_one_machine_keep_to_it():
    launched = env.launched_environment(env.RankEnvironment(1, 2, 1), {"GLOO_SOCKET_IFNAME": "ib0", "A": "b"})
    assert (launched["GLOO_SOCKET_IFNAME"], launched["NCCL_SOCKET_IFNAME"], launched["A"]) == ("lo", "=lo", "b")
    place = {"MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"}
    rank = env.RankEnvironment(0, 4, 0)
    away = dict(place)
    assert env.read_address(rank, away) == env.Address("gpu7", 29500, False, "0", False)
    assert away == place
    assert env.read_address(rank, {**place, "LOCAL_WORLD_SIZE": "4"}).one_machine
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"}
    assert env.read_address(rank, {**place, **step}) == env.Address("127.0.0.1", 29500, False, "0", True)
