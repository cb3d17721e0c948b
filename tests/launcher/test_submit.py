"""Slurm jobs: values are quoted wherever they stand, and sbatch gets an argument list."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from longctx.config import Config
from longctx.errors import ConfigError, NotAvailableError
from longctx.launcher import cli
from longctx.launcher.commands.submit import prepare, render

EVIL = [
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
    "sbatch": '#!/bin/sh\nprintf "%s\\n" "$@" > sbatch-arguments\necho Submitted batch job 17\n',
}

# An srun whose rank 1 left a reason and whose other ranks were killed.
LAST_WORDS = """#!/bin/sh
echo '{{"rank": 1, "seconds": 1.0, "exit_code": {code}, "message": "why", "traceback": null, "where": "n1"}}' \
  > runs/a/failures/rank-1.json
exit 143
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**sections) -> str:
    return render(prepare(Config.from_dict(sections)))


def run_script(script, **extra):
    environment = {**os.environ, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "17", **extra}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("evil", EVIL)
def test_odd_names_stay_names(evil, stubs):
    cluster = {"name": "x", "partition": evil, "account": evil}
    script = job(run={"name": evil, "dir": f"runs/{evil}"}, cluster=cluster)
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert not list(stubs.rglob("canary*"))
    assert f"{stubs}/runs/{evil}/config.yaml" in done.stdout.splitlines()


def test_the_job_asks_for_the_cluster_of_the_configuration(stubs):
    mapping = {
        "cluster": {"nodes": 4, "devices_per_node": 2, "partition": "gpu", "time_limit": "2-00:00:00"},
        "parallel": {"sp": 8},
        "run": {"name": "long", "dir": "runs/long"},
    }
    script = job(**mapping)
    for line in (
        "#SBATCH --job-name=long",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --signal=USR1@180",
    ):
        assert line in script.splitlines()
    assert "--account" not in script
    assert "GLOO_SOCKET_IFNAME" in script


def test_a_job_resumes_where_checkpoints_are_and_requeues_itself_on_75(stubs):
    script = job(run={"dir": "runs/a"})
    done = run_script(script, SRUN_STATUS="75")
    assert "--auto-resume" in done.stdout.split()
    assert done.returncode == 75
    assert "scontrol requeue 17" in done.stderr
    assert "requeue" not in run_script(script, SRUN_STATUS="65").stderr


def test_the_first_rank_s_reason_decides_not_srun_s_status(stubs):
    """srun ends with the status of the ranks that it killed after the first had ended."""
    (stubs / "bin/srun").write_text(LAST_WORDS.format(code=75))
    script = job(run={"dir": "runs/a"})
    done = run_script(script)
    assert (done.returncode, "scontrol requeue 17" in done.stderr) == (75, True)
    assert "longctx: why" in done.stderr
    (stubs / "bin/srun").write_text(LAST_WORDS.format(code=65))
    done = run_script(script)
    assert (done.returncode, "requeue" in done.stderr) == (65, False)


def test_dry_run_prints_and_writes_nothing(stubs, capsys):
    before = sorted(stubs.rglob("*"))
    assert cli.main(["submit", "--dry-run", "run.name='$(touch canary)'", "run.dir=runs/a"]) == 0
    assert "#SBATCH --job-name='$(touch canary)'" in capsys.readouterr().out
    assert sorted(stubs.rglob("*")) == before


def test_submit_writes_the_run_and_calls_sbatch(stubs, capsys):
    assert cli.main(["submit", "run.dir=runs/a"]) == 0
    assert "Submitted batch job 17" in capsys.readouterr().out
    assert Path("sbatch-arguments").read_text().strip() == str(stubs / "runs/a/train.sbatch")
    assert (stubs / "runs/a/config.yaml").is_file()


def test_without_slurm_it_is_not_available(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit"]) == NotAvailableError.exit_code
    assert "sbatch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_job_is_refused():
    with pytest.raises(ConfigError, match="comm=sim"):
        prepare(Config.from_dict({"comm": {"backend": "sim"}}))
    with pytest.raises(ConfigError, match="control characters"):
        Config.from_dict({"run": {"name": "a\n#SBATCH --wrap=x"}})
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
