"""The command line: help with examples, one message per error, and the contract's exit codes."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from longctx.errors import DataError, NumericsError, RequeueError, StorageError
from longctx.launcher import cli, env
from longctx.launcher.commands import train
from longctx.launcher.compose import compose
from longctx.launcher.failures import Failure, clear_failures, first_failure, run_recorded
from longctx.launcher.ranks import world
from longctx.launcher.resuming import Resume


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A composition root that records its calls, in an empty working directory."""
    calls = []
    fake = types.ModuleType("longctx.launcher.build")
    for name in ("preflight", "run_sim"):
        setattr(fake, name, lambda config, resume, name=name: calls.append((name, config, resume)))
    fake.train_with = lambda meeting, config, resume, checked: calls.append(("train_with", config, resume))
    fake.calls = calls
    import longctx.launcher

    monkeypatch.setattr(world, "meet", lambda config, options: contextlib.nullcontext())
    monkeypatch.setattr(train, "follow", lambda: None)
    monkeypatch.setitem(sys.modules, "longctx.launcher.build", fake)
    monkeypatch.setattr(longctx.launcher, "build", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in (env.RANK, env.WORLD_SIZE, env.LOCAL_RANK, env.MASTER_ADDR, env.MASTER_PORT):
        # Set before it is deleted, so that what the command exports is undone afterwards.
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return fake


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command.name in out
    assert "78 configuration" in out


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: c.name)
def test_help_of_a_command_shows_its_examples(command, capsys):
    assert cli.main([*command.name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    for example in command.examples:
        assert example in out


@pytest.mark.parametrize(
    "example",
    [e for c in cli.COMMANDS if c.overrides for e in c.examples],
)
def test_examples_compose(example):
    words = shlex.split(example)
    compose([word for word in words if "=" in word and not word.startswith("-")]).check()


@pytest.mark.parametrize(("word", "near"), [("trian", "train"), ("lanch", "launch"), ("verfy", "verify")])
def test_an_unknown_command_names_the_nearest(word, near, capsys):
    assert cli.main([word, "model=tiny"]) == 2
    assert f"{word} is not a command; did you mean {near}?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["trian"], ["train", "--nproc", "2"], ["launch"], ["launch", "--nproc", "x"]])
def test_usage_errors_end_with_2(words, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert "usage: longctx" in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "data.seqlen=5"], 78),
        (["train", "seqlen"], 2),
        (["train", "engine=megatron"], 78),
        (["train", "parallel.sp=2"], 78),
        (["launch", "--nproc", "2", "comm=sim"], 78),
        (["launch", "--nproc", "0"], 78),
        (["launch", "--nproc", "3", "parallel.sp=2"], 78),
        (["launch", "--nproc", "2", "train.global_batch=3"], 78),
        (["submit", "--dry-run", "comm=sim"], 78),
        (["launch", "--nproc", "4", "cluster=slurm", "cluster.nodes=4"], 78),
        (["train", "cluster.nodes=2"], 78),
        (["train", "comm=sim", "parallel.sp=4", "cluster.nodes=2"], 78),
    ],
)
def test_refusals_are_one_line_and_leave_nothing_behind(words, code, capsys, build):
    assert cli.main(words) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("longctx: ")
    assert captured.err.count("\n") == 1
    assert build.calls == []
    assert list(Path.cwd().iterdir()) == []


def test_nccl_without_devices_is_not_available(capsys, build, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["launch", "--nproc", "2", "comm=nccl", "parallel.sp=2"]) == 69
    assert "2 processes, this machine has 0" in capsys.readouterr().err
    assert build.calls == []


def test_one_process_too_few_is_told_how_to_launch(capsys, build):
    cli.main(["train", "parallel.sp=2"])
    assert "longctx launch --nproc 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(DataError, 65), (NumericsError, 70), (StorageError, 74), (RequeueError, 75)]
)
def test_errors_of_the_run_end_with_their_code(error, code, capsys, build):
    def fail(*_, checked):
        raise error("why")

    build.train_with = fail
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == "longctx: why\n"


def test_a_bug_shows_its_traceback_and_ends_with_70(capsys, build):
    def fail(*_, checked):
        raise ZeroDivisionError("a bug")

    build.train_with = fail
    assert cli.main(["train"]) == 70
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_train_alone_is_a_world_of_one(build):
    assert cli.main(["train", "run.dir=run", "train.steps=3"]) == 0
    build.calls.clear()
    assert cli.main(["train", "--resume=run", "train.seed=4"]) == 0
    (checked, config, _), (ran, same, resume) = build.calls
    assert (config.train.steps, config.train.seed) == (3, 4)
    assert (checked, ran, resume) == ("preflight", "train_with", Resume())
    assert same is config
    assert config.parallel.dp_shard == 1
    assert Path("run/config.yaml").is_file()
    assert env.read_rank() == env.RankEnvironment(0, 1, 0)


def test_train_under_sim_is_the_whole_world(build):
    assert cli.main(["train", "comm=sim", "parallel.sp=4", "run.dir=run"]) == 0
    assert [call[0] for call in build.calls] == ["preflight", "run_sim"]
    assert build.calls[1][1].parallel.sp == 4


def test_a_rank_under_torchrun_prepares_only_on_rank_0(build, monkeypatch):
    for name, value in ((env.RANK, "1"), (env.WORLD_SIZE, "2"), (env.LOCAL_RANK, "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(env.MASTER_ADDR, "127.0.0.1")
    monkeypatch.setenv(env.MASTER_PORT, "29500")
    monkeypatch.setenv(env.TORCHELASTIC_RUN_ID, "abc")
    assert cli.main(["train", "parallel.sp=2"]) == 0
    ((name, config, _),) = build.calls
    assert (name, config.run.dir) == ("train_with", "runs/job-abc")
    assert not Path("runs").exists()


@pytest.mark.parametrize(("nodes", "status"), [(2, 0), (3, 78)])
def test_ranks_may_stand_on_as_many_nodes_as_there_are_ranks(nodes, status, build, monkeypatch, capsys):
    for name, value in ((env.RANK, "0"), (env.WORLD_SIZE, "2"), (env.LOCAL_RANK, "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(env.MASTER_ADDR, "127.0.0.1")
    monkeypatch.setenv(env.MASTER_PORT, "29500")
    assert cli.main(["train", "parallel.sp=2", "run.dir=run", f"cluster.nodes={nodes}"]) == status
    told = capsys.readouterr().err
    assert ("cluster.nodes=3, but the world has 2 processes" in told and "longctx submit" in told) == (status == 78)


def test_ranks_that_cannot_agree_on_a_directory_are_refused(build, monkeypatch, capsys):
    monkeypatch.setenv(env.RANK, "0")
    monkeypatch.setenv(env.WORLD_SIZE, "2")
    monkeypatch.delenv(env.TORCHELASTIC_RUN_ID, raising=False)
    assert cli.main(["train", "parallel.sp=2"]) == 78
    assert "run.dir=null" in capsys.readouterr().err


def test_a_second_fresh_run_does_not_mix_with_the_first(build, capsys):
    Path("run/checkpoints/step-12").mkdir(parents=True)
    Path("run/checkpoints/step-9").mkdir()
    assert cli.main(["train", "run.dir=run"]) == 78
    assert "step-12" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_written_is_an_io_error(build, capsys):
    Path("file").write_text("")
    assert cli.main(["train", "run.dir=file/run"]) == 74
    assert "run.dir=file/run" in capsys.readouterr().err


def test_the_first_failure_is_the_cause(tmp_path, capsys):
    def fail():
        raise DataError("why")

    assert run_recorded(1, tmp_path, fail) == 65
    assert run_recorded(0, tmp_path, lambda: 1 / 0) == 70
    where = f"process {os.getpid()} on {platform.node()}"
    assert first_failure(tmp_path) == Failure(1, first_failure(tmp_path).seconds, 65, "why", None, where)
    clear_failures(tmp_path)
    assert first_failure(tmp_path) is None
    assert run_recorded(0, None, fail) == 65
    assert capsys.readouterr().err == "longctx: why\n"
    assert run_recorded(3, None, lambda: 1 / 0) == 70
    assert f"longctx: rank 3 ({where}) crashed: ZeroDivisionError: division by zero\n" in capsys.readouterr().err


def test_the_installed_script_runs_from_anywhere(tmp_path):
    script = Path(sys.executable).parent / "longctx"
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("longctx ")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "data=text", "data.path='https://me:s3cret@host/x'"],
        ["train", "run.name='ftp://me:s3cret@host'"],
        ["train", "https://me:s3cret@host"],
        ["train", "data.paht=https://me:s3cret@host/x"],
        ["train", "--no-such=https://me:s3cret@host/x"],
        ["https://me:s3cret@host"],
        ["submit", "--dry-run", "cluster.prologue=['export http_proxy=http://me:s3cret@proxy:80']"],
    ],
)
def test_a_login_in_a_url_is_repeated_nowhere(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) in (2, 78)
    captured = capsys.readouterr()
    assert captured.err and "s3cret" not in captured.out + captured.err
    assert list(tmp_path.rglob("*")) == []
