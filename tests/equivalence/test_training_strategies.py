"""Every strategy trains the same run as one rank, alone and beside tensor and pipeline parallelism."""

import pytest

from longctx.catalog import STRATEGIES
from tests.equivalence.test_training_parity import largest_difference
from tests.train.small_run import small_config, train_on_sim

SHARED = [name for name in STRATEGIES if name != "local"]
MESHES = {"sp 4": {"sp": 4}, "tp 2 x sp 2": {"tp": 2, "sp": 2}, "pp 2 x sp 2": {"pp": 2, "sp": 2}}
ROWS = {"usp": {"ulysses_degree": 2}, "burst": {"inner_ring": 2}}
SHORT, LONG = 3, 20


def train(directory, strategy: str, parallel: dict[str, int], steps: int, **attention):
    config = small_config(
        directory,
        parallel=parallel,
        # Ring self-attention knows no documents, so neither does the run that it is compared with.
        attention={"strategy": strategy, "layout": None, "document_mask": strategy != "rsa", **attention},
        train={"steps": steps},
        logger={"memory": steps == LONG},
    )
    return train_on_sim(config)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank's run, with and without edges between documents."""
    found = {}

    def of(documents: bool, steps: int):
        if (documents, steps) not in found:
            directory = tmp_path_factory.mktemp("alone")
            found[documents, steps] = train(directory, "local", {}, steps, document_mask=documents)
        return found[documents, steps]

    return of


def check(alone, directory, strategy: str, mesh: str, steps: int, **attention) -> None:
    found = train(directory, strategy, MESHES[mesh], steps, **ROWS.get(strategy, {}), **attention)
    assert largest_difference(found, alone(strategy != "rsa", steps)) <= 1e-9


@pytest.mark.parametrize("strategy", SHARED)
def test_three_steps_over_four_ranks_agree_with_one(alone, tmp_path, strategy):
    check(alone, tmp_path, strategy, "sp 4", SHORT)


@pytest.mark.parametrize("strategy", ["ulysses", "burst"])
def test_heads_and_stages_are_split_too(alone, tmp_path, strategy):
    check(alone, tmp_path / "heads", strategy, "tp 2 x sp 2", 1)
    check(alone, tmp_path / "stages", strategy, "pp 2 x sp 2", SHORT)


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", SHARED)
def test_twenty_steps_of_every_strategy_agree_with_one_rank(alone, tmp_path, strategy, mesh):
    check(alone, tmp_path, strategy, mesh, LONG)
