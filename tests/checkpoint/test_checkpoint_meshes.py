"""What was saved under tensor parallelism and replicas is read under any other mesh, bit for bit."""

import math

import pytest
import torch
from safetensors import safe_open

from longctx.checkpoint.checkpointer import Checkpointer, TrainState
from longctx.config import ModelConfig, simulated_world_size
from longctx.mesh import build_mesh
from longctx.model import Decoder, initialize
from longctx.parallel import parallelize
from longctx.parallel.data import full_tensor
from longctx.sim import Cluster
from tests.parallel.small_decoder import config_of

# Two key/value heads are fewer than four ranks; sixty rows over two, and what is left over three, are uneven.
MODEL = ModelConfig(
    vocab_size=60, dim=16, layers=1, heads=4, kv_heads=2, head_dim=6, hidden_dim=20, qk_norm=True, tie_embeddings=False
)
MESHES = {
    "1": {},
    "dp2": {"dp_shard": 2},
    "sp2": {"sp": 2},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "sp3 tp2": {"sp": 3, "tp": 2},
    "replicate2 tp2": {"dp_replicate": 2, "tp": 2},
}


def state_on(config, seed):
    """A fresh run whose optimizer has stepped once, so that it has a momentum."""
    model = Decoder(config.model).double()
    initialize(model, seed)
    parallelize(model, config, build_mesh(config.parallel, "cpu"))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, foreach=False)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return TrainState(model, optimizer, None, None, 0)


def digest(state):
    """Weights and momenta, whole."""
    named = dict(state.model.named_parameters())
    momenta = {name: state.optimizer.state[p]["momentum_buffer"] for name, p in named.items()}
    weights = {f"weight {name}": full_tensor(p.detach()) for name, p in named.items()}
    return weights | {f"momentum {name}": full_tensor(momentum) for name, momentum in momenta.items()}


def save(config, directory):
    state = state_on(config, seed=1)
    Checkpointer(directory).save(1, state)
    return digest(state)


def load_each(config, directories):
    found = []
    state = state_on(config, seed=2)
    for directory in directories:
        for parameter in state.model.parameters():
            parameter.detach().to_local().zero_()
        Checkpointer(directory).load(state)
        found.append(digest(state))
    return found


def on_mesh(name, function, *args):
    config = config_of(**MESHES[name], model=MODEL)
    return Cluster(simulated_world_size(config)).run(function, config, *args)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint per mesh, and what all of them hold."""
    root = tmp_path_factory.mktemp("meshes")
    held = {name: on_mesh(name, save, root / name)[0] for name in MESHES}
    assert all(same(digest, held["1"]) for digest in held.values())
    return {name: root / name for name in MESHES}, held["1"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Three axes take torch several seconds to plan.
TARGETS = [pytest.param(name, marks=pytest.mark.matrix if "replicate" in name else ()) for name in MESHES]


@pytest.mark.parametrize("target", TARGETS)
def test_every_mesh_reads_every_other(checkpoints, target):
    directories, expected = checkpoints
    for found in on_mesh(target, load_each, list(directories.values())):
        assert [same(digest, expected) for digest in found] == [True] * len(MESHES)


@pytest.mark.parametrize("name", MESHES)
def test_names_are_those_of_one_device_and_no_element_is_written_twice(checkpoints, name):
    directories, _ = checkpoints
    written: dict[str, int] = {}
    for file in (directories[name] / "step-1").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                written[key] = written.get(key, 0) + math.prod(tensors.get_slice(key).get_shape())
    weights = {key.removeprefix("model."): count for key, count in written.items() if key.startswith("model.")}
    assert weights == {name: p.numel() for name, p in Decoder(MODEL).named_parameters()}
