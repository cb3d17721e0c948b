"""Models with linear layers train the same run over any mesh as on one rank."""

import pytest

from longctx.catalog import MIXERS
from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import small_config, train_on_sim

MESHES = {
    "sp 2": {"sp": 2},
    "sp 4": {"sp": 4},
    "dp 2 x sp 2": {"dp_shard": 2, "sp": 2},
    "tp 2 x sp 2": {"tp": 2, "sp": 2},
    "pp 2 x sp 2": {"pp": 2, "sp": 2},
}


def train(directory, parallel, steps, mixer, pattern="LS", **attention):
    config = small_config(
        directory,
        model={"pattern": pattern, "mixer": mixer},
        parallel=parallel,
        attention={"strategy": "gather" if "S" in pattern else "lasp2", "chunk": 4, **attention},
        train={"steps": steps},
        logger={"memory": steps == 20},
    )
    return train_on_sim(config)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank's run of each mixer, with chunks of another size: what a chunk is changes no number."""
    found = {}

    def of(mixer, steps, pattern="LS"):
        if (mixer, steps, pattern) not in found:
            found[mixer, steps, pattern] = train(
                tmp_path_factory.mktemp("alone"), {}, steps, mixer, pattern, layout="contiguous", chunk=16
            )
        return found[mixer, steps, pattern]

    return of


@pytest.mark.parametrize("mixer", MIXERS)
def test_three_steps_of_every_mixer_agree_with_one_rank(alone, tmp_path, mixer):
    assert largest_difference(train(tmp_path, {"sp": 2}, 3, mixer), alone(mixer, 3)) <= 1e-9


@pytest.mark.parametrize("mesh", MESHES)
def test_three_steps_of_a_hybrid_agree_with_one_rank(alone, tmp_path, mesh):
    found = train(tmp_path, MESHES[mesh], 3, "gated_deltanet")
    assert largest_difference(found, alone("gated_deltanet", 3)) <= 1e-9


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
def test_a_model_without_softmax_layers(alone, tmp_path, strategy):
    found = train(tmp_path, {"sp": 3}, 3, "simple_gla", "L", strategy=strategy, layout="zigzag")
    assert largest_difference(found, alone("simple_gla", 3, "L")) <= 1e-9


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("mixer", ["gated_deltanet", "hgrn2", "gla", "basic"])
def test_twenty_steps_of_hybrids_agree_with_one_rank(alone, tmp_path, mixer, mesh):
    assert largest_difference(train(tmp_path, MESHES[mesh], 20, mixer), alone(mixer, 20)) <= 1e-9
