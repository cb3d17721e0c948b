"""A run small enough to save and load in milliseconds, with all that makes state hard to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longctx.checkpoint.checkpointer import Checkpointer, TrainState
from longctx.sim import Cluster

# Name → (ranks, shape of the FSDP2 mesh); shape None stands for one process without process group and FSDP2.
LAYOUTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "1": (1, (1,)),
    "2": (2, (2,)),
    "4": (4, (4,)),
    "2x2": (4, (2, 2)),  # HSDP: two replicas of two shards
}


class Small(nn.Module):
    """Uneven and tiny shards, a tied weight, a buffer, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.one = nn.Linear(6, 5)
        self.two = nn.Linear(5, 6)
        self.gain = nn.Parameter(torch.ones(2))  # fewer rows than four ranks
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.25)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.two(torch.tanh(self.one(self.drop(self.embed(tokens)))))
        return self.head(hidden) * self.gain.sum()


@dataclass
class Cursor:
    """A data loader that is nothing but its position."""

    position: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next_sample": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["next_sample"]


@dataclass
class Digest:
    """Everything that must survive, as full tensors."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)
    plain: tuple[Any, ...] = ()

    def same(self, other: Digest) -> bool:
        return (
            _equal(self.weights, other.weights)
            and _equal(self.optimizer, other.optimizer)
            and self.options == other.options
            and self.plain == other.plain
        )


def make(shape: tuple[int, ...] | None, seed: int = 0) -> TrainState:
    """A fresh run: AdamW with two groups, a schedule, a cursor."""
    torch.manual_seed(seed)
    model = Small()
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for part in (model.one, model.two, model):
            fully_shard(part, mesh=mesh)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return TrainState(model, optimizer, scheduler, Cursor(), 0)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


def train(state: TrainState, steps: int) -> None:
    """Steps whose data follow from the cursor and whose dropout follows from the generator."""
    for _ in range(steps):
        tokens = (torch.arange(7) * 3 + state.loader.position) % 13
        state.optimizer.zero_grad()
        state.model(tokens).square().mean().backward()
        state.optimizer.step()
        state.scheduler.step()
        state.loader.position += 4
        state.step += 1


def digest(state: TrainState) -> Digest:
    """What the run holds, gathered; every rank calls it."""
    named = dict(state.model.named_parameters())
    return Digest(
        {n: _full(t) for n, t in [*named.items(), *state.model.named_buffers()]},
        {f"{n}.{k}": _full(v) for n, p in named.items() for k, v in state.optimizer.state[p].items()},
        [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups],
        (state.scheduler.state_dict(), state.loader.state_dict(), state.step),
    )


def saved(directory: Path, steps: int = 3, keep: int = 0) -> list[Digest]:
    """Trains in a lone process and saves at each step; what each of the checkpoints holds."""
    state = make(None)
    checkpointer = Checkpointer(directory, keep)
    digests = []
    for step in range(1, steps + 1):
        train(state, 1)
        checkpointer.save(step, state)
        digests.append(digest(state))
    return digests


def on_cluster(name: str, function: Any, *args: Any) -> list[Any]:
    """``function(shape, *args)`` on the ranks of a layout."""
    world, shape = LAYOUTS[name]
    return Cluster(world).run(function, shape, *args)


def _full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )
