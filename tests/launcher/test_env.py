"""Who this process is, by torchrun's or srun's word."""

import os
from pathlib import Path

import pytest

from longctx.errors import ConfigError
from longctx.launcher import env
from longctx.launcher.env import RankEnvironment
from longctx.launcher.schedulers import first_host


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


IN_STEP = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "differs",
    [
        *({"SLURM_STEP_ID": str(2**32 - number)} for number in range(1, 8)),
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_STEP_ID": ""},
        {"SLURM_STEP_ID": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=lambda differs: " ".join(differs.values()),
)
def test_a_shell_inside_an_allocation_is_no_rank(differs):
    assert env.read_rank(IN_STEP | differs) is None
    assert env.read_rank({name: value for name, value in IN_STEP.items() if name != "SLURM_STEP_ID"}) is None


def test_the_step_s_own_count_of_tasks_goes_before_the_allocation_s():
    assert env.read_rank(IN_STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == RankEnvironment(0, 1, 0)
    # srun with PMI2 sets its variables too.
    assert env.read_rank(IN_STEP | {"PMI_SIZE": "8", "PMI_RANK": "0"}) == RankEnvironment(0, 8, 0)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (IN_STEP | {"SLURM_PTY_PORT": "40001"}, "SLURM_NTASKS=8 and SLURM_STEP_ID=0 say.*`unset SLURM_STEP_ID`"),
        (IN_STEP | {"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: an MPI launcher"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"RANK=\$PMI_RANK WORLD_SIZE=\$PMI_SIZE"),
    ],
)
def test_what_may_be_one_of_many_is_told_which_variables_say_so(environ, words):
    with pytest.raises(ConfigError, match=words):
        env.read_rank(environ)
    # A shell with one task, and ranks that torchrun started there, are as they seem.
    assert env.read_rank(environ | {"RANK": "1", "WORLD_SIZE": "3"}) == RankEnvironment(1, 3, 1)
    if "SLURM_PTY_PORT" in environ:
        assert env.read_rank(environ | {"SLURM_STEP_NUM_TASKS": "1"}) == RankEnvironment(0, 1, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("rack[2-3]node[1,5]", "rack2node1"),
        ("a-1.site.org,b", "a-1.site.org"),
        ("dgx[12]", "dgx12"),
        ("", None),
        ("node[", None),
        ("$(hostname)", None),
        ("node[a-b]", None),
    ],
)
def test_the_first_host_of_a_list_is_read_without_scontrol(nodes, first):
    assert first_host(nodes) == first


def test_ranks_of_srun_meet_on_the_step_s_first_node():
    places = []
    for rank in range(2):
        environ = IN_STEP | {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-4]"}
        environ["SLURM_STEP_NODELIST"] = "n[3-4]"
        env.export_rank(env.read_rank(environ), environ)
        places.append((environ["MASTER_ADDR"], environ["MASTER_PORT"]))
    assert places[0] == places[1] == ("n3", "20005")
    other = IN_STEP | {"SLURM_STEP_ID": "1", "SLURM_JOB_NODELIST": "n[1-4]", "MASTER_ADDR": "chosen"}
    env.export_rank(env.read_rank(other), other)
    assert (other["MASTER_ADDR"], other["MASTER_PORT"]) == ("chosen", "20012")
    for unknown in ({}, {"SLURM_JOB_NODELIST": "n1", "SLURM_DISTRIBUTION": "arbitrary"}):
        with pytest.raises(ConfigError, match=r"Slurm's variables.*scontrol show hostnames.*unset SLURM_STEP_ID"):
            env.export_rank(RankEnvironment(0, 8, 0), IN_STEP | unknown)


def test_a_world_of_one_meets_nobody_wherever_the_shell_s_other_ranks_met():
    environ = {"MASTER_ADDR": "another-node", "MASTER_PORT": "29500"}
    env.export_rank(RankEnvironment(0, 1, 0), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "0")


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
    fixed = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    env.share_cores(1, environ)
    assert environ == {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **fixed}
    env.share_cores(10**6, environ)
    assert environ == {"OMP_NUM_THREADS": "1", **fixed}
    chosen = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE", "TOKENIZERS_PARALLELISM": "true"}
    env.share_cores(1, chosen)
    assert chosen == dict(chosen, OMP_NUM_THREADS="7", OMP_WAIT_POLICY="ACTIVE", TOKENIZERS_PARALLELISM="true")


def test_the_launch_s_id():
    assert env.run_id({"TORCHELASTIC_RUN_ID": "none"}) is None
    assert env.run_id({"TORCHELASTIC_RUN_ID": "u-u-i-d"}) == "u-u-i-d"
    assert env.run_id({"TORCHELASTIC_RUN_ID": "u-u-i-d", "SLURM_JOB_ID": "17"}) == "17"
    assert env.run_id({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0"}) == "17"
    assert env.run_id({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2"}) == "17-2"
    assert env.run_id({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": str(2**32 - 6)}) == "17"


def test_caches_lie_where_xdg_says():
    assert env.cache_directory({"XDG_CACHE_HOME": "/fast", "HOME": "/home/me"}) == Path("/fast/longctx")
    assert env.cache_directory({"XDG_CACHE_HOME": "odd", "HOME": "/home/me"}) == Path("/home/me/.cache/longctx")
    assert env.cache_directory({}) is None
