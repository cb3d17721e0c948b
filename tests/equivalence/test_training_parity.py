"""Every mesh trains the same run: same losses, same gradient norms, from one seed over the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.catalog import LAYOUTS
from longctx.launcher.verify import parity_table as parity_page
from tests.train.small_run import small_config, train_on_sim

WORKER = Path(__file__).with_name("gloo_training_worker.py")
ROOT = Path(__file__).parents[2]

# dp_shard, sp, layout, micro_batch, recompute
MESHES = [
    (2, 1, "contiguous", 1, "none"),
    (1, 2, "striped", 1, "none"),
    (1, 3, "contiguous", 2, "full"),
    (1, 4, "zigzag", 2, "none"),
    (2, 2, "contiguous", 1, "selective"),
]


# parallel, model, layout, micro_batch, recompute
TIED, UNTIED, PLAIN = {}, {"tie_embeddings": False}, {"tie_embeddings": False, "qk_norm": False}
SPLIT_MESHES = [
    ({"dp_replicate": 2}, TIED, "zigzag", 1, "none"),
    ({"dp_replicate": 2, "dp_shard": 2}, TIED, "zigzag", 1, "none"),
    ({"tp": 2}, PLAIN, "contiguous", 2, "none"),
    ({"dp_shard": 2, "tp": 2}, TIED, "zigzag", 1, "selective"),
    ({"sp": 2, "tp": 2}, TIED, "zigzag", 1, "full"),
]
MORE_MESHES = [
    ({"tp": 4}, TIED, "contiguous", 1, "none"),  # two key/value heads for four ranks
    ({"tp": 4}, PLAIN, "contiguous", 2, "full"),
    ({"sp": 2, "tp": 2}, UNTIED, "striped", 2, "none"),
    ({"dp_shard": 2, "tp": 2}, PLAIN, "zigzag", 1, "none"),
    ({"dp_replicate": 2, "tp": 2}, UNTIED, "zigzag", 1, "selective"),
    ({"dp_shard": 2, "sp": 2, "tp": 2}, TIED, "striped", 1, "full"),
]


SHORT, LONG = 4, 20  # steps of make test and of the matrix, which measures memory as well


def largest_difference(left, right):
    assert len(left) == len(right)
    return max(abs(a[i] - b[i]) / max(1.0, abs(b[i])) for a, b in zip(left, right, strict=True) for i in (0, 1))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One rank's run of so many steps, once."""
    found = {}

    def of(steps):
        if steps not in found:
            found[steps] = train_on_sim(small_config(tmp_path_factory.mktemp("single"), train={"steps": steps}))[0]
        return found[steps]

    return of


def test_the_run_learns_something(single):
    assert single(20)[19][0] < 0.8 * single(20)[0][0]


@pytest.mark.parametrize("dp_shard,sp,layout,micro_batch,recompute", MESHES)
@pytest.mark.parametrize("steps", [6, pytest.param(LONG, marks=pytest.mark.matrix)])
def test_fp64_steps_agree_with_one_rank(single, tmp_path, steps, dp_shard, sp, layout, micro_batch, recompute):
    config = small_config(
        tmp_path,
        parallel={"dp_shard": dp_shard, "sp": sp},
        attention={"layout": layout},
        train={"micro_batch": micro_batch, "recompute": recompute, "steps": steps},
    )
    found, _ = train_on_sim(config)
    assert largest_difference(found, single(steps)) <= 1e-9


def train(directory, parallel, model, layout, micro_batch, recompute, steps):
    """A run of four sequences a step: enough for two replicas of two shards, twice where there are fewer."""
    config = small_config(
        directory,
        parallel=parallel,
        model=model,
        attention={"layout": layout},
        train={"micro_batch": micro_batch, "recompute": recompute, "steps": steps, "global_batch": 4},
        logger={"memory": steps == LONG},
    )
    return train_on_sim(config)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank's run of each model, once."""
    found = {}

    def of(model, steps):
        key = (tuple(model.items()), steps)
        if key not in found:
            directory = tmp_path_factory.mktemp("alone")
            found[key] = train(directory, {}, model, "contiguous", 1, "none", steps)
        return found[key]

    return of


@pytest.mark.parametrize("parallel,model,layout,micro_batch,recompute", SPLIT_MESHES, ids=str)
def test_split_tensors_and_replicas_agree_with_one_rank(
    alone, tmp_path, parallel, model, layout, micro_batch, recompute
):
    steps = train(tmp_path, parallel, model, layout, micro_batch, recompute, SHORT)
    assert largest_difference(steps, alone(model, SHORT)) <= 1e-9


@pytest.mark.matrix
@pytest.mark.parametrize("parallel,model,layout,micro_batch,recompute", [*SPLIT_MESHES, *MORE_MESHES], ids=str)
def test_twenty_steps_of_more_meshes_agree_with_one_rank(
    alone, tmp_path, parallel, model, layout, micro_batch, recompute
):
    steps = train(tmp_path, parallel, model, layout, micro_batch, recompute, LONG)
    assert largest_difference(steps, alone(model, LONG)) <= 1e-9


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parallel", parity_page.MESHES, ids=str)
def test_the_trainer_agrees_with_one_rank_on_every_mesh_of_the_page(alone, tmp_path, parallel, layout):
    steps = train(tmp_path, parallel, TIED, layout, 1, "none", LONG)
    assert largest_difference(steps, alone(TIED, LONG)) <= 1e-9


def test_two_runs_are_bit_identical_whatever_order_ranks_take(tmp_path):
    runs = [
        train_on_sim(
            small_config(
                tmp_path / str(seed),
                parallel={"dp_shard": 2, "sp": 2},
                comm={"shuffle_seed": seed},
                train={"steps": 3, "dtype": "float32"},
            )
        )[0]
        for seed in (None, 11)
    ]
    assert runs[0] == runs[1]


@pytest.mark.gloo
def test_two_gloo_processes_agree_with_one_rank(tmp_path):
    """Ten fp32 steps over a sequence group, shards, split tensors and stages, canary included, in one launch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    expected, _ = train_on_sim(small_config(tmp_path / "one", train={"steps": 10, "dtype": "float32"}))
    for name in ("sequence", "shards", "tensors", "stages"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = [(record["loss"], record["grad_norm"]) for record in records]
        assert len(steps) == 10
        assert largest_difference(steps, expected[:10]) <= 1e-4
        assert records[0]["memory_peak_bytes"] > 0
        assert json.loads((tmp_path / name / "environment.json").read_text())["canary"]["passed"]
