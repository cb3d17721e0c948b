"""Slurm jobs: what a job asks for, that values stay values, and how an attempt ends."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.checkpoint.directory import CheckpointDirectory
from longctx.config import Config
from longctx.errors import ConfigError, NotAvailableError
from longctx.launcher import cli, env
from longctx.launcher.commands.submit import prepare
from longctx.launcher.signal_lead import signal_lead
from longctx.launcher.slurm_script import render

HOSTILE = [
    "$(touch canary)",
    "`touch canary`",
    "a; touch canary",
    "a' ; touch canary '",
    'a" $(touch canary) "',
    "a b",
]

# Stands in for Slurm: srun prints what it was given; the rest answers or stays silent.
STUBS = {
    "srun": '#!/bin/sh\nprintf "%s\\n" "$@"\nexit ${SRUN_STATUS:-0}\n',
    "scontrol": '#!/bin/sh\necho "scontrol $*" >&2\necho node7\n',
    "sbatch": '#!/bin/sh\nprintf "%s\\n" "$@" > sbatch-arguments\nenv > sbatch-environment\n'
    "echo Submitted batch job 17\n",
}

# An srun whose rank 1 left a reason and whose other ranks were killed.
LAST_WORDS = """#!/bin/sh
echo '{{"rank": 1, "seconds": 1.0, "exit_code": {code}, "message": "why", "traceback": null, "where": "n1"}}' \
  > runs/a/slurm/17-attempt-1-failures/rank-1.json
exit 143
"""


def stand_ins(folder):
    """A folder for PATH."""
    place = folder / "bin"
    place.mkdir()
    for name, text in STUBS.items():
        (place / name).write_text(text)
        (place / name).chmod(stat.S_IRWXU)
    return place


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{stand_ins(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**sections) -> str:
    return render(prepare(Config.from_dict({**sections, "run": {"dir": "run", **sections.get("run", {})}})))


def asked(script) -> list[str]:
    """The options that Slurm reads in a script."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def run_script(script, **extra):
    environment = {**os.environ, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "17", **extra}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)


def log_of(folder, attempt=1) -> str:
    return (folder / f"slurm/17-attempt-{attempt}.log").read_text()


@pytest.mark.parametrize("evil", HOSTILE)
def test_odd_names_stay_names(evil, stubs, monkeypatch):
    (stubs / evil).mkdir()
    monkeypatch.chdir(stubs / evil)
    cluster = {"partition": evil, "account": evil, "sbatch": {"comment": evil, "constraint": [evil, evil]}}
    done = run_script(job(run={"name": evil, "dir": f"runs/{evil}"}, cluster=cluster))
    assert done.returncode == 0, done.stderr
    assert not list(stubs.rglob("canary*"))
    directory = stubs / evil / "runs" / evil
    assert f"{directory}/config.yaml" in log_of(directory).splitlines()


@settings(max_examples=60)
@given(
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=9),
    st.sampled_from(["\ntouch canary", "\n#SBATCH --wrap=touch", "; touch canary", "\r", "'$(touch canary)'", ""]),
    st.sampled_from(["run.name", "run.dir", "cluster.partition", "cluster.sbatch.comment", "cwd", "python"]),
)
def test_any_text_anywhere_is_refused_or_inert(text, tail, place):
    """Such as a line break in the working directory, which was a line of the script once."""
    evil = f"x{text}{tail}"
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        here = Path(folder) / (evil if place == "cwd" else "here")
        here.mkdir()
        patched.chdir(here)
        patched.setenv("PATH", f"{stand_ins(Path(folder))}:{os.environ['PATH']}")
        if place == "python":
            patched.setattr(sys, "executable", evil)
        *sections, key = place.split(".")
        mapping = {}
        inner = mapping
        for section in sections:
            inner = inner.setdefault(section, {})
        inner |= {key: evil} if sections else {}
        try:
            script = job(**mapping)
        except ConfigError as refused:
            if "control characters" in str(refused) or "scripts cannot hold" in str(refused):
                return
            raise
        assert not [line for line in script.splitlines() if line.startswith(("touch", "#SBATCH --wrap"))]
        assert all(len(shlex.split(option)) == 1 for option in asked(script))
        assert run_script(script).returncode == 0
        assert not list(Path(folder).rglob("canary*"))
        assert list(Path(folder).rglob("17-attempt-1.log"))


def test_the_job_asks_for_the_cluster_of_the_configuration(stubs):
    mapping = {
        "cluster": {"nodes": 4, "devices_per_node": 2, "partition": "gpu", "time_limit": "2-00:00:00"},
        "parallel": {"sp": 8},
        "run": {"name": "long"},
    }
    script = job(**mapping)
    wanted = {"--job-name=long", "--nodes=4", "--ntasks-per-node=2", "--time=2-00:00:00", "--partition=gpu"}
    assert wanted | {"--signal=USR1@600", "--requeue"} <= set(asked(script))
    assert "--account" not in script and "gpu:" not in script and "--gpus" not in script
    assert "GLOO_SOCKET_IFNAME" in script


@pytest.mark.parametrize(
    ("cluster", "lines"),
    [
        ({}, {"--gpus-per-node=4"}),
        ({"gpus": "gres"}, {"--gres=gpu:4"}),
        ({"gpus": "none"}, set()),
        ({"sbatch": {"gpus_per_node": "h100:4"}}, {"--gpus-per-node=h100:4"}),
        ({"sbatch": {"gres": "gpu:a100:4"}}, {"--gres=gpu:a100:4"}),
        ({"sbatch": {"gres": "lustre:1"}}, {"--gpus-per-node=4", "--gres=lustre:1"}),
    ],
)
def test_a_job_on_gpus_asks_for_them_in_the_site_s_way(cluster, lines):
    script = job(comm={"backend": "nccl"}, cluster={"devices_per_node": 4, **cluster}, parallel={"sp": 4})
    assert {line for line in asked(script) if "gpu" in line or "gres" in line} == lines


def test_any_option_of_sbatch_is_taken_as_it_is_typed(capsys, stubs):
    words = ["mem=0", "exclusive=true", "nice=100", "mail-type=[END,FAIL]", "constraint='a&b|c'", "qos=null"]
    words += ["overcommit=false", "mem_per_cpu=4G", "nodelist='n[1-4]'", "comment='$(touch canary)'"]
    assert cli.main(["submit", "--dry-run", *(f"cluster.sbatch.{word}" for word in words)]) == 0
    script = capsys.readouterr().out
    assert asked(script)[7:-3] == [
        "--mem=0",
        "--exclusive",
        "--nice=100",
        "--mail-type=END,FAIL",
        "--constraint='a&b|c'",
        "--mem-per-cpu=4G",
        "--nodelist='n[1-4]'",
        "--comment='$(touch canary)'",
    ]


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"sbatch": {"ntasks-per-node": 2}}, "ntasks-per-node is set by cluster.devices_per_node"),
        ({"sbatch": {"job_name": "a"}}, "job_name is set by run.name"),
        ({"sbatch": {"signal": "USR1@9"}}, "signal is set by cluster.signal_seconds"),
        ({"sbatch": {"output": "a"}}, "output cannot be set: each attempt has a log"),
        ({"sbatch": {"array": "0-3"}}, "array cannot be set: one directory holds one run"),
        ({"sbatch": {"gpus-per-task": 1}}, "gpus-per-task cannot be set: a rank takes the device of its number"),
        ({"sbatch": {"p": "gpu"}}, "write a long option"),
        ({"sbatch": {"--mem": 0}}, "write a long option"),
        ({"sbatch": {"a b": 0}}, "write a long option"),
        ({"sbatch": {"mem\n": 0}}, "control characters"),
        ({"sbatch": {"mem-per-cpu": 1, "mem_per_cpu": 2}}, "stands twice"),
        ({"sbatch": {"mem": {"a": 1}}}, "cluster.sbatch.mem="),
        ({"sbatch": {"comment": "a\\b"}}, "backslash"),
        ({"sbatch": [1]}, "expected a mapping"),
        ({"gpus": "gpu"}, "cluster.gpus=gpu is not known"),
        ({"prologue": ["a\nb"]}, "control characters"),
        ({"prologue": ["export http_proxy=http://me:secret@proxy"]}, r"http://\*\*\*@proxy' holds a login"),
        ({"signal_seconds": 600, "time_limit": "00:10:00"}, "nearest valid value: 599"),
        ({"signal_seconds": 70_000}, "nearest valid value: 65535"),
    ],
)
def test_what_would_break_the_job_is_refused_by_name(cluster, words):
    with pytest.raises(ConfigError, match=words) as refused:
        Config.from_dict({"cluster": cluster})
    assert "secret" not in str(refused.value)


def test_the_prologue_runs_before_the_ranks_and_ends_the_job_where_it_fails(stubs):
    lines = ["[ -z $UNSET ]; export MODULE='a  b'", "hash -r"]
    (stubs / "bin/srun").write_text('#!/bin/sh\nprintf "<%s>" "$MODULE"\n')
    assert run_script(job(run={"dir": "a"}, cluster={"prologue": lines})).returncode == 0
    assert log_of(stubs / "a") == "scontrol show hostnames node[7-8]\n<a  b>"
    assert run_script(job(run={"dir": "b"}, cluster={"prologue": ["false # no such module", *lines]})).returncode == 1
    assert log_of(stubs / "b") == "longctx: cluster.prologue failed: false\n"


def test_each_attempt_has_a_log_of_its_own_and_a_stop_puts_the_job_back(stubs):
    script = job(run={"dir": "runs/a"})
    done = run_script(script, SRUN_STATUS="75")
    assert done.returncode == 75
    assert done.stdout.endswith(f"writes to {stubs}/runs/a/slurm/17-attempt-1.log\n")
    assert run_script(script, SRUN_STATUS="65", SLURM_RESTART_COUNT="1").returncode == 65
    first, second = log_of(stubs / "runs/a"), log_of(stubs / "runs/a", attempt=2)
    assert "--auto-resume" in first.split() and "--auto-resume" in second.split()
    assert ("scontrol requeue 17" in first, "requeue" in second) == (True, False)
    assert stat.S_IMODE((stubs / "runs/a/slurm").stat().st_mode) == 0o700
    script = job(run={"dir": "runs/b"}, cluster={"requeue": False})
    assert "--no-requeue" in asked(script)
    assert run_script(script, SRUN_STATUS="75").returncode == 75
    assert "requeue" not in log_of(stubs / "runs/b")


@pytest.mark.parametrize("code", [75, 65])
def test_the_first_rank_s_reason_decides_not_srun_s_status(code, stubs):
    """srun ends with the status of the ranks that it killed after the first had ended."""
    (stubs / "bin/srun").write_text(LAST_WORDS.format(code=code))
    assert run_script(job(run={"dir": "runs/a"})).returncode == code
    told = log_of(stubs / "runs/a")
    assert "longctx: why" in told
    assert ("scontrol requeue 17" in told) == (code == 75)


def test_the_signal_s_lead_follows_from_what_the_run_has_measured(tmp_path):
    def lead(**cluster):
        return signal_lead(Config.from_dict({"cluster": cluster}), tmp_path)[0]

    assert [lead(), lead(signal_seconds=45), lead(time_limit="00:10:00")] == [600, 45, 300]
    records = [{"step": step, "step_seconds": seconds} for step, seconds in enumerate([900.0, 40.0, 100.0], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    assert lead() == 600
    saves = CheckpointDirectory(tmp_path / "checkpoints")
    saves.begin(1)
    saves.commit(1)
    assert 0 <= saves.save_seconds() < 10
    (tmp_path / ".save-seconds").write_text("130.0\n")
    assert lead() == 60 + 100 + 2 * 130 + 30
    assert lead(time_limit="00:10:00") == 300
    for damaged in ("", "nan", "inf", "-1", "x"):
        (tmp_path / ".save-seconds").write_text(damaged)
        assert lead() == 600


def test_dry_run_prints_and_writes_nothing(stubs, capsys):
    before = sorted(stubs.rglob("*"))
    assert cli.main(["submit", "--dry-run", "run.name='$(touch canary)'", "run.dir=runs/a"]) == 0
    assert "#SBATCH --job-name='$(touch canary)'" in capsys.readouterr().out
    assert sorted(stubs.rglob("*")) == before


def test_submit_writes_the_run_and_calls_sbatch_as_from_outside_of_any_job(stubs, capsys, monkeypatch):
    inside = {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_CPU": "9", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    monkeypatch.setattr(env, "_shared", {})
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in {**inside, "SLURM_CONF": "site", "SBATCH_QOS": "mine"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["submit", "run.dir=runs/a"]) == 0
    assert "Submitted batch job 17" in capsys.readouterr().out
    assert Path("sbatch-arguments").read_text().strip() == str(stubs / "runs/a/train.sbatch")
    assert (stubs / "runs/a/config.yaml").is_file()
    told = dict(line.split("=", 1) for line in Path("sbatch-environment").read_text().splitlines() if "=" in line)
    # The threads are those that this command has chosen for itself.
    assert not {*inside, "OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & told.keys()
    assert (told["SLURM_CONF"], told["SBATCH_QOS"]) == ("site", "mine")


def test_without_slurm_it_is_not_available(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit"]) == NotAvailableError.exit_code
    assert "sbatch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_job_is_refused():
    with pytest.raises(ConfigError, match="comm=sim"):
        prepare(Config.from_dict({"comm": {"backend": "sim"}}))
    with pytest.raises(ConfigError, match=r"cluster\.devices_per_node=null: .* set cluster=slurm, which means 8"):
        prepare(Config.from_dict({"comm": {"backend": "nccl"}, "parallel": {"sp": 8}}))
    with pytest.raises(ConfigError, match="does not divide the world's 1 process"):
        prepare(Config.from_dict({"parallel": {"sp": 8}}))


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ({"layout": "zigzag", "layout_block": 4}, "layout_block 4 applies to the striped layout, not to zigzag"),
        ({"strategy": "striped", "layout": "contiguous"}, "attention.strategy=striped refuses"),
    ],
)
def test_what_every_rank_would_refuse_is_no_job(attention, words):
    mapping = {"attention": attention, "cluster": {"devices_per_node": 8}, "parallel": {"sp": 8}}
    with pytest.raises(ConfigError, match=words):
        prepare(Config.from_dict(mapping))
