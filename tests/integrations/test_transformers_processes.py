"""Two Gloo processes: a loop of one's own, and twenty steps of ``Trainer``, equal one process of transformers' own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, of the extra hf")

from tests.integrations.transformers_worker import main

ROOT = Path(__file__).parents[2]


@pytest.mark.gloo
def test_a_loop_and_a_trainer(tmp_path):
    """Packed rows, mixed windows, recompute, two microbatches a step, clipping, an evaluation of the loss."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    ranks = subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.transformers_worker", "2", str(tmp_path)],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        main(0, 1, str(tmp_path))
        output = ranks.communicate(timeout=120)[0]
    finally:
        ranks.terminate()
    assert ranks.returncode == 0, output
    one, *two = [
        json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for world, rank in ((1, 0), (2, 0), (2, 1))
    ]
    theirs = one["theirs"]
    assert len(theirs["losses"]) == len(theirs["norms"]) == 20 and len(theirs["evaluated"]) == 2
    assert theirs["losses"][-1] < theirs["losses"][0] - 1
    for found in (one, *two):
        assert found["loop"] == pytest.approx(one["loop"], rel=1e-5)
        for name, wanted in theirs.items():
            assert found["ours"][name] == pytest.approx(wanted, rel=1e-5), name
