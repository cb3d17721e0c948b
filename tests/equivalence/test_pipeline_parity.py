"""A pipeline trains the same run as one rank, whatever the schedule and what else the mesh shards."""

import pytest
import torch

from longctx.config import Config, simulated_world_size
from longctx.launcher import build
from longctx.mesh import build_mesh
from longctx.parallel.pipeline import Pipeline
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from tests.train.small_run import CPU, Recorder, corpus, small_config, train_on_sim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev")
MESHES = ({}, {"sp": 2}, {"dp_shard": 2, "sp": 2})
SHORT, LONG = 6, 20


def run_config(directory, layout: str = "zigzag", tied: bool = True, **changes) -> Config:
    """Eight packed sequences a step; every micro-batch has documents and valid tokens of its own."""
    return small_config(
        directory,
        model={"layers": 4, "tie_embeddings": tied},
        attention={"layout": layout},
        data={"seq_len": 37},
        parallel=changes.pop("parallel", {}),
        train={"global_batch": 8, "steps": SHORT, **changes},
        logger={"memory": changes.get("steps") == LONG},
    )


def assert_same_run(found, expected):
    assert len(found) == len(expected)
    worst = max(abs(a[i] - b[i]) / max(1.0, abs(b[i])) for a, b in zip(found, expected) for i in (0, 1))
    assert worst <= 1e-9


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One rank's run, by (tied, steps)."""
    runs = {}

    def run(tied: bool = True, steps: int = SHORT):
        if (tied, steps) not in runs:
            config = run_config(tmp_path_factory.mktemp("single"), tied=tied, steps=steps)
            runs[tied, steps] = train_on_sim(config)[0]
        return runs[tied, steps]

    return run


@pytest.mark.parametrize(
    ("schedule", "mesh", "layout", "tied", "micro_batch"),
    [
        ("gpipe", {}, "zigzag", True, 2),
        ("1f1b", {}, "contiguous", False, 1),
        ("1f1b", {"sp": 2}, "zigzag", True, 2),
        ("interleaved_1f1b", {"sp": 2}, "striped", True, 2),
        ("zbv", {}, "zigzag", True, 2),
        ("zbv", {"sp": 2}, "striped", False, 2),
        ("dualpipev", {}, "zigzag", False, 2),
        ("1f1b", {"dp_shard": 2, "sp": 2}, "striped", True, 2),
    ],
    ids=str,
)
def test_six_steps_agree_with_one_rank(single, tmp_path, schedule, mesh, layout, tied, micro_batch):
    parallel = {"pp": 2, "pp_schedule": schedule, **mesh}
    config = run_config(tmp_path, layout, tied, parallel=parallel, micro_batch=micro_batch)
    assert_same_run(train_on_sim(config)[0], single(tied))


def test_recompute_changes_nothing(single, tmp_path):
    parallel = {"pp": 2, "pp_schedule": "interleaved_1f1b"}
    config = run_config(tmp_path, parallel=parallel, micro_batch=2, recompute="full")
    assert_same_run(train_on_sim(config)[0], single())


@pytest.mark.matrix
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps_of_every_mix_agree_with_one_rank(single, tmp_path, schedule, mesh, layout, tied):
    parallel = {"pp": 2, "pp_schedule": schedule, **mesh}
    config = run_config(tmp_path, layout, tied, parallel=parallel, steps=LONG)
    assert_same_run(train_on_sim(config)[0], single(tied, LONG))


def train_and_look(config: Config) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The embedding of the first and of the last stage after a few steps, where this rank has them."""
    trainer = build.build_trainer(config, None, corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU))
    trainer.sink.close({})
    trainer.sink = Recorder()
    trainer.run()
    model = trainer.state.model
    assert isinstance(model, Pipeline)
    ends = (model.first, model.last)
    return tuple(None if end is None else end.embedding.weight.to_local().detach().clone() for end in ends)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_both_copies_of_a_tied_embedding_stay_equal_bit_by_bit(tmp_path, schedule):
    parallel = {"pp": 2, "sp": 2, "pp_schedule": schedule}
    config = run_config(tmp_path, parallel=parallel, steps=3, micro_batch=2, dtype="float32")
    ranks = Cluster(simulated_world_size(config)).run(train_and_look, config)
    for shard in range(2):
        first, last = ranks[shard][0], ranks[shard + (2 if schedule == "1f1b" else 0)][1]
        assert first is not None and torch.equal(first, last)
