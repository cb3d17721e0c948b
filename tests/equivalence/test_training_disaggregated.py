"""Disaggregated attention trains the same run as one rank: alone, beside tensors and stages, and in turns."""

import pytest

from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import small_config, train_on_sim

MESHES = {"sp 4": {"sp": 4}, "tp 2 x sp 2": {"tp": 2, "sp": 2}, "pp 2 x sp 2": {"pp": 2, "sp": 2}}


def run(directory, parallel, steps, strategy="disaggregated", **train):
    """Records of the steps, and the simulated world."""
    config = small_config(
        directory,
        parallel=parallel,
        attention={"strategy": strategy, "layout": None, "ping_pong": strategy == "disaggregated"},
        train={"steps": steps, "global_batch": 4, "micro_batch": 2, **train},
        logger={"memory": steps == 20},
    )
    return train_on_sim(config)


def train(*args, **options):
    return run(*args, **options)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {steps: train(tmp_path_factory.mktemp("alone"), {}, steps, "local") for steps in (3,)}


@pytest.mark.parametrize("mesh", MESHES)
def test_two_halves_in_turn_agree_with_one_rank(alone, tmp_path, mesh):
    assert largest_difference(train(tmp_path, MESHES[mesh], 3), alone[3]) <= 1e-9


@pytest.mark.parametrize("train_options", [{"recompute": "full"}, {"recompute": "selective", "mlp_chunk": 5}], ids=str)
def test_recompute_sends_nothing_twice(alone, tmp_path, train_options):
    _, plain = run(tmp_path / "plain", {"sp": 2}, 3)
    found, recomputed = run(tmp_path / "recomputed", {"sp": 2}, 3, **train_options)
    assert largest_difference(found, alone[3]) <= 1e-9
    assert [recomputed.ledger.sent(rank) for rank in range(2)] == [plain.ledger.sent(rank) for rank in range(2)]


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_in_turn_agree_with_one_rank(tmp_path, mesh):
    one = train(tmp_path / "one", {}, 20, "local")
    assert largest_difference(train(tmp_path / "shared", MESHES[mesh], 20), one) <= 1e-9
