"""A pipeline whose stages serve one another's attention trains the same run as one rank."""

import pytest

from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import small_config, train_on_sim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FEW, MANY = 4, 20
# Mesh, layers and sequences of a step: microbatches are fewer than stages, as many, or more; layers divide or do not.
CASES = {
    "pp 2": ({"pp": 2}, 2, 4, {}),
    "pp 2, one microbatch": ({"pp": 2}, 3, 1, {}),
    "pp 2 x sp 2": ({"pp": 2, "sp": 2}, 3, 2, {}),
    "pp 3": ({"pp": 3}, 5, 4, {}),
    "pp 3, fewer microbatches": ({"pp": 3}, 4, 2, {}),
    "tp 2 x pp 2": ({"tp": 2, "pp": 2}, 3, 4, {}),
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
        attention={"strategy": "disaggregated", "layout": None, "servers": "pipeline", **more.get("attention", {})},
        train={"steps": steps, "global_batch": sequences, **train},
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
