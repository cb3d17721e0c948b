"""Processes of one job without torch or a process group: whose words are told, and who is ended."""

import json
from pathlib import Path

import pytest

from longctx.errors import NumericsError
from longctx.launcher.processes import Workers, run_gloo

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


def test_ranks_that_take_too_long_are_named_and_ended(run, tmp_path):
    with pytest.raises(NumericsError, match=r"^ranks 0(, 1)? had not ended after 1 s$"):
        run("waits", limit=1)
    process = tmp_path / "process"
    assert not process.exists() or not Path(f"/proc/{process.read_text()}").exists()
