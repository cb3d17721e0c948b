"""A pipeline whose stages serve one another's attention trains the same run as one rank."""

from dataclasses import replace

import pytest

from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated import lockstep as ticks
from longctx.attention.strategies.disaggregated.assignment import planned
from longctx.launcher import build
from longctx.mesh import build_mesh
from longctx.parallel.core import work_of
from longctx.parallel.stage_servers import softmax_layers
from longctx.planner import AttentionShape
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import CPU, Recorder, corpus, small_config, train_on_sim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FEW, MANY = 4, 20
# Mesh, layers and sequences of a step: microbatches are fewer than stages, as many, or more; layers divide or do not.
CASES = {
    "pp 2": ({"pp": 2}, 2, 4, {}),
    "pp 2, one microbatch": ({"pp": 2}, 3, 1, {}),
    "pp 2 x sp 2": ({"pp": 2, "sp": 2}, 3, 2, {}),
    "pp 2 x sp 2, two rows": ({"pp": 2, "sp": 2}, 3, 4, {"train": {"micro_batch": 2}}),
    "pp 3": ({"pp": 3}, 5, 4, {}),
    "pp 3, fewer microbatches": ({"pp": 3}, 4, 2, {}),
    "tp 2 x pp 2": ({"tp": 2, "pp": 2}, 3, 2, {}),
    "dp 2 x pp 2": ({"dp_shard": 2, "pp": 2}, 2, 4, {}),
    "zeppelin": ({"pp": 2, "sp": 2}, 3, 2, {"attention": {"strategy": "zeppelin", "layout": "zigzag"}}),
    "linear layers": (
        {"pp": 2, "sp": 2},
        4,
        4,
        {"model": {"pattern": "SL", "mixer": "basic"}, "attention": {"layout": "contiguous"}},
    ),
}  # fmt: skip


def config_of(directory, case, steps, **train):
    mesh, layers, sequences, more = CASES[case]
    return small_config(
        directory,
        model={"layers": layers, **more.get("model", {})},
        parallel={**mesh, "pp_schedule": "gpipe"},
        attention={"strategy": "disaggregated", "layout": None, "server_pool": "pipeline", **more.get("attention", {})},
        train={"steps": steps, "global_batch": sequences, **more.get("train", {}), **train},
        logger={"memory": steps == MANY},
        comm={"shuffle_seed": steps},  # of the order in which ranks take turns
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank's run of the same layers and sequences, by case and steps."""
    runs = {}

    def run(case, steps):
        _, layers, sequences, more = CASES[case]
        model = {"layers": layers, **more.get("model", {})}
        key = (*sorted(model.items()), sequences, steps)
        if key not in runs:
            attention = {"strategy": "local", "layout": None}
            train = {"steps": steps, "global_batch": sequences}
            config = small_config(tmp_path_factory.mktemp("alone"), model=model, attention=attention, train=train)
            runs[key] = train_on_sim(config)[0]
        return runs[key]

    return run


@pytest.mark.parametrize("case", CASES)
def test_four_steps_agree_with_one_rank(alone, tmp_path, case):
    found, _ = train_on_sim(config_of(tmp_path, case, FEW))
    assert largest_difference(found, alone(case, FEW)) <= 1e-9


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_agree_with_one_rank(alone, tmp_path, case):
    found, _ = train_on_sim(config_of(tmp_path, case, MANY))
    assert largest_difference(found, alone(case, MANY)) <= 1e-9


@pytest.mark.parametrize("train_options", [{"recompute": "full"}, {"recompute": "selective", "mlp_chunk": 5}], ids=str)
def test_recompute_sends_nothing_twice(alone, tmp_path, train_options):
    case = "pp 2, one microbatch"
    _, plain = train_on_sim(config_of(tmp_path / "plain", case, 2))
    found, recomputed = train_on_sim(config_of(tmp_path / "recomputed", case, 2, **train_options))
    assert largest_difference(found, alone(case, 2)) <= 1e-9
    assert [recomputed.ledger.sent(rank) for rank in range(2)] == [plain.ledger.sent(rank) for rank in range(2)]


def test_no_bit_depends_on_the_order_of_turns(tmp_path):
    plain = config_of(tmp_path, "pp 2 x sp 2", 2)
    turned = replace(plain, comm=replace(plain.comm, shuffle_seed=None))
    assert train_on_sim(turned)[0] == train_on_sim(plain)[0]


def told(config):
    """What a rank's run tells of its first step, and the plans of that step's microbatches."""
    mesh = build_mesh(config.parallel, "cpu")
    meter = Meter(mesh, CPU, work=work_of(config, mesh), every_stage=True)
    trainer = build.build_trainer(config, None, corpus(), meter)
    trainer.sink.close({})
    trainer.sink = recorder = Recorder()
    border, batches = BatchSharder.of(config, mesh, CPU), trainer.state.loader.step(0)
    trainer.run()
    return recorder.records[0], [border.plan(batch) for batch in batches]


def test_a_step_tells_what_all_stages_served_and_sent(tmp_path):
    config = config_of(tmp_path, "tp 2 x pp 2", 1)
    ranks = Cluster(4).run(told, config)
    record, plans = ranks[0]
    assert all(other["work_by_rank"] == record["work_by_rank"] for other, _ in ranks)
    heads, kv_heads = config.local_heads
    layers, sizes = softmax_layers(config), Sizes(1, heads, kv_heads, config.model.head_dim, 8, 8)
    step = ticks.lockstep_plan_of(plans, layers, "cad", AttentionShape(heads, kv_heads, config.model.head_dim, 8))
    volumes = [step.volume(rank, sizes) for rank in range(2)]
    assert record["bytes_by_rank"] == [volume.forward + volume.backward for volume in volumes]
    assert record["comm_bytes"] == 2 * sum(record["bytes_by_rank"])  # of both ranks that split tensors
    work = record["work_by_rank"]
    assert work == [step.work(rank) for rank in range(2)]
    assert sum(work) == sum(layers) * sum(plan.work(0) for plan in plans)
    # Two layers are on one stage and one on the other, and still both compute as much.
    assert sorted(layers) == [1, 2] and record["balance"] == max(work) / sum(work) * 2 <= 1.1


def test_every_exchange_is_planned_once_a_step(tmp_path, monkeypatch):
    """Of five forward ticks and five backward, with two microbatches in turned order in the middle ones."""
    seen = []
    monkeypatch.setattr(ticks, "planned", lambda *asked: seen.append(asked) or planned(*asked))
    train_on_sim(config_of(tmp_path, "pp 2", 2))
    assert len(seen) == 2 * 10
