"""Who this process is, by torchrun's or srun's word."""

import os
from pathlib import Path

import pytest

from longctx.errors import ConfigError
from longctx.launcher import env
from longctx.launcher.env import RankEnvironment


def test_nobody_said_anything():
    assert env.read_rank({}) is None
    assert env.run_id({}) is None


def test_torchrun_says_all_three():
    assert env.read_rank({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == RankEnvironment(3, 8, 1)


def test_srun_says_it_in_its_own_words():
    task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert env.read_rank(task) == RankEnvironment(3, 8, 1)
    # torchrun under srun: the inner word counts.
    assert env.read_rank({**task, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == RankEnvironment(0, 2, 0)


def test_a_shell_inside_an_allocation_is_no_rank():
    assert env.read_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}) is None


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2 must lie in \[0, WORLD_SIZE=2\)"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' must be a non-negative integer"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK='a'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK=''"),
    ],
)
def test_half_a_word_is_refused(environ, words):
    with pytest.raises(ConfigError, match=words):
        env.read_rank(environ)


def test_export_gives_a_world_of_one_an_address_and_asks_others_for_theirs():
    environ: dict[str, str] = {}
    env.export_rank(RankEnvironment(0, 1, 0), environ)
    assert environ == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        env.export_rank(RankEnvironment(0, 2, 0), {})


def test_cores_are_shared_anew_for_each_count_unless_the_user_chose(monkeypatch):
    monkeypatch.setattr(env, "_shared", {})
    environ: dict[str, str] = {}
    env.share_cores(1, environ)
    assert environ == {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "OMP_WAIT_POLICY": "PASSIVE"}
    env.share_cores(10**6, environ)
    assert environ == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    chosen = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    env.share_cores(1, chosen)
    assert chosen == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}


def test_the_launch_s_id():
    assert env.run_id({"TORCHELASTIC_RUN_ID": "none"}) is None
    assert env.run_id({"TORCHELASTIC_RUN_ID": "u-u-i-d"}) == "u-u-i-d"
    assert env.run_id({"TORCHELASTIC_RUN_ID": "u-u-i-d", "SLURM_JOB_ID": "17"}) == "17"


def test_caches_lie_where_xdg_says():
    assert env.cache_directory({"XDG_CACHE_HOME": "/fast", "HOME": "/home/me"}) == Path("/fast/longctx")
    assert env.cache_directory({"XDG_CACHE_HOME": "odd", "HOME": "/home/me"}) == Path("/home/me/.cache/longctx")
    assert env.cache_directory({}) is None
