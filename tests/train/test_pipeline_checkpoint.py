"""What a pipeline saves is the whole model under its names: any other mesh goes on from it, and the reverse."""

import itertools
import json
import math
import shutil

import pytest
from safetensors import safe_open

from longctx.config import Config, simulated_world_size
from longctx.launcher import build
from longctx.mesh import build_mesh
from longctx.sim import Cluster
from longctx.train.meter import Meter
from tests.train.small_run import CPU, Recorder, corpus, small_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
MESHES = {
    "1": {},
    "pp2": {"pp": 2},
    "pp2 zbv": {"pp": 2, "pp_schedule": "zbv"},  # the first and the last stage share a rank
    "dp2": {"dp_shard": 2},
    "sp2": {"sp": 2},
    "pp2 sp2": {"pp": 2, "sp": 2},
}
PAIRS = [
    *itertools.permutations(("1", "pp2", "pp2 zbv"), 2),
    *(("dp2", "pp2"), ("pp2", "dp2"), ("sp2", "pp2 sp2"), ("pp2 sp2", "sp2"), ("pp2", "pp2")),
]
OTHERS = [pair for pair in itertools.product(MESHES, MESHES) if pair not in PAIRS]
DONE, STEPS = 2, 3


def config_of(directory, mesh: str) -> Config:
    return small_config(
        directory,
        model={"layers": 4},
        data={"seq_len": 29},
        parallel=MESHES[mesh],
        train={"steps": STEPS, "global_batch": 4},
        checkpoint={"every": DONE, "at_end": False},
    )


def train(config: Config, resume: bool) -> list[tuple[float, float]]:
    meter = Meter(build_mesh(config.parallel, "cpu"), CPU)
    trainer = build.build_trainer(config, resume, corpus(), meter)
    trainer.sink.close({})
    trainer.sink = recorder = Recorder()
    trainer.run()
    return [(record["loss"], record["grad_norm"]) for record in recorder.records]


def run(directory, mesh: str, resume: bool = False) -> list[tuple[float, float]]:
    config = config_of(directory, mesh)
    return Cluster(simulated_world_size(config), trace=False).run(train, config, resume)[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run on every mesh, which leaves a checkpoint of step 2 behind, by mesh: (directory, what it recorded)."""
    root = tmp_path_factory.mktemp("saved")
    return {mesh: (root / mesh, run(root / mesh, mesh)) for mesh in MESHES}


@pytest.mark.parametrize(
    ("source", "target"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in OTHERS)]
)
def test_a_run_goes_on_where_another_mesh_left_it(uninterrupted, tmp_path, source, target):
    directory, expected = uninterrupted[source]
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    for found, right in zip(run(tmp_path, target, resume=True), expected[DONE:], strict=True):
        assert found == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("mesh", ["pp2", "pp2 zbv", "pp2 sp2"])
def test_a_pipeline_writes_what_one_rank_writes_and_nothing_twice(uninterrupted, mesh):
    def shapes(name):
        found = {}
        for file in (uninterrupted[name][0] / "checkpoints" / f"step-{DONE}").glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    found[key] = found.get(key, 0) + math.prod(tensors.get_slice(key).get_shape())
        return {key: size for key, size in found.items() if not key.startswith("rng.")}

    def optimizer(name):
        state = json.loads((uninterrupted[name][0] / "checkpoints" / f"step-{DONE}" / "state.json").read_text())
        groups = [sorted(group["parameters"]) for group in state["optimizer"]["groups"]]
        return groups, state["optimizer"]["state"]

    assert shapes(mesh) == shapes("1")
    assert optimizer(mesh) == optimizer("1")
