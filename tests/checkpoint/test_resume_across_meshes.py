"""A run saved on any mesh goes on on any other: the same samples, the same losses, the same files."""

import hashlib
import itertools
import json
import math
import shutil

import pytest
from safetensors import safe_open

from longctx.config import Config, simulated_world_size
from longctx.launcher import build
from longctx.launcher.resuming import Resume
from longctx.mesh import build_mesh
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from tests.train.small_run import CPU, Recorder, corpus, small_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
MESHES = {
    "1": {},
    "dp2": {"dp_shard": 2},
    "hsdp 2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 zbv": {"pp": 2, "pp_schedule": "zbv"},  # the first and the last stage share a rank
    "sp2": {"sp": 2},
    "tp2 pp2 sp2": {"tp": 2, "pp": 2, "sp": 2},
}
PAIRS = [
    *itertools.permutations(("1", "pp2", "pp2 zbv"), 2),
    *(("dp2", "pp2"), ("pp2", "hsdp 2x2"), ("sp2", "tp2"), ("tp2", "pp2"), ("hsdp 2x2", "tp2"), ("pp2", "pp2")),
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


def train(config: Config, resume: Resume | None) -> tuple[list[tuple[float, float]], list[set[str]]]:
    """Loss and gradient norm of each step, and the sequences that this rank took part in."""
    meter = Meter(build_mesh(config.parallel, "cpu"), CPU)
    trainer = build.build_trainer(config, resume, corpus(), meter)
    trainer.sink.close({})
    trainer.sink = recorder = Recorder()
    border, samples = trainer.prefetcher._sharder, [set() for _ in range(STEPS)]

    def noted(batch, plan):
        samples[trainer.state.step] |= {hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch.tokens}
        return border(batch, plan)

    noted.plan = border.plan
    trainer.prefetcher._sharder = noted
    trainer.run()
    return [(record["loss"], record["grad_norm"]) for record in recorder.records], samples


def run(directory, mesh: str, resume: Resume | None = None) -> tuple[list[tuple[float, float]], list[set[str]]]:
    config = config_of(directory, mesh)
    ranks = Cluster(simulated_world_size(config), trace=False).run(train, config, resume)
    return ranks[0][0], [set().union(*step) for step in zip(*(samples for _, samples in ranks), strict=True)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs that leave a checkpoint of step 2, by mesh, made when asked for: (directory, losses, samples)."""
    root, runs = tmp_path_factory.mktemp("saved"), {}

    def of(mesh):
        if mesh not in runs:
            runs[mesh] = (root / mesh, *run(root / mesh, mesh))
        return runs[mesh]

    return of


@pytest.mark.parametrize(
    ("source", "target"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in OTHERS)]
)
def test_a_run_goes_on_where_another_mesh_left_it(uninterrupted, tmp_path, source, target):
    directory, expected, samples = uninterrupted(source)
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    found, taken = run(tmp_path, target, resume=Resume())
    assert taken[DONE:] == samples[DONE:]
    assert len(samples[DONE]) == 4
    for step, right in zip(found, expected[DONE:], strict=True):
        assert step == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("mesh", ["pp2", "pp2 zbv", pytest.param("tp2 pp2 sp2", marks=pytest.mark.matrix)])
def test_a_pipeline_writes_what_one_rank_writes_and_nothing_twice(uninterrupted, mesh):
    def shapes(name):
        found = {}
        for file in (uninterrupted(name)[0] / "checkpoints" / f"step-{DONE}").glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    found[key] = found.get(key, 0) + math.prod(tensors.get_slice(key).get_shape())
        return {key: size for key, size in found.items() if not key.startswith("rng.")}

    def optimizer(name):
        state = json.loads((uninterrupted(name)[0] / "checkpoints" / f"step-{DONE}" / "state.json").read_text())
        groups = [sorted(group["parameters"]) for group in state["optimizer"]["groups"]]
        return groups, state["optimizer"]["state"]

    assert shapes(mesh) == shapes("1")
    assert optimizer(mesh) == optimizer("1")
