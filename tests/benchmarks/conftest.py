"""Benchmarks run in the test's own process, which has torch already; their ranks are processes."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from longctx.launcher import env

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a benchmark ended. ``stderr``: without lines that only say how far it is."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def bench(monkeypatch, capsys):
    # Set before the command sets them for its ranks, so that it is undone afterwards.
    for name, value in (("PYTHONPATH", str(ROOT)), (env.OMP_WAIT_POLICY, "PASSIVE"), (env.DS_ACCELERATOR, "cpu")):
        monkeypatch.setenv(name, value)

    def run(*words: str) -> Done:
        code = main(list(words))
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if not line.startswith("benchmarks ")]
        return Done(code, out, "\n".join(said))

    return run
