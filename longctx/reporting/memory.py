"""Measures where the memory of a step goes: bytes by category at the moment when most of them are in use.

One step of a run is taken under a mode that sees every storage come and go. It computes the same numbers as any
other, more slowly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.engines import Engine
from longctx.mesh import Mesh
from longctx.model import Decoder, Vocabulary
from longctx.operators import IMPLEMENTATIONS
from longctx.parallel.host_memory import host_buffers
from longctx.reporting.live_storages import LiveStorages, StorageLife
from longctx.sequence import LocalBatch

_log = logging.getLogger(__name__)

MEMORY = "memory.json"
# In the order in which a report shows them. `gathered`: parameters that FSDP2 has unsharded. `activations`: kept for
# the backward pass; `recomputed`: made by it again. `loss`: the hidden states' and the head's gradient and a chunk's
# logits. `attention`: its buffers, messages included. `offloaded`: on CUDA it lies elsewhere, so it is 0 there.
CATEGORIES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gathered": "gathered parameters",
    "gradients": "gradients",
    "activations": "activations kept for backward",
    "recomputed": "recomputed activations",
    "offloaded": "offloaded to host memory",
    "loss": "loss",
    "attention": "attention and its messages",
    "temporary": "temporary",
}


def category_of(life: StorageLife) -> str:
    """Tells the category of a storage from all that became of it."""
    if life.tag in CATEGORIES and life.region != "loss":
        return life.tag
    if life.region == "loss":
        return "loss"
    if life.given and len(life.sizes) > 1:
        return "gathered"  # nobody but FSDP2 resizes what stays
    if life.kept:
        return "activations"
    if life.region is not None:
        return life.region
    return "recomputed" if life.backward and life.recording else "temporary"


class HasEngine(Protocol):
    """Takes optimizer steps through its ``engine``."""

    engine: Engine


class StepMemory:
    """Measures the steps that are taken inside ``measured``; ``models``: what the engine runs forward."""

    def __init__(
        self, models: Sequence[Decoder], optimizer: Optimizer, device: torch.device, directory: Path | None = None
    ) -> None:
        self._models = models
        self._optimizer = optimizer
        self._device = device
        self._directory = directory

    @contextmanager
    def measured(self, step: HasEngine) -> Iterator[dict[str, int]]:
        """Yields a mapping that it fills at the end: bytes by category, their sum under ``peak``."""
        storages = LiveStorages(self._device.type, IMPLEMENTATIONS)
        found: dict[str, int] = {}
        engine, vocabularies = step.engine, [model.vocabulary for model in self._models]
        self._tag(storages)
        with ExitStack() as stack:
            step.engine = _Watched(engine, self._models, storages)
            for model in self._models:
                model.vocabulary = _WatchedVocabulary(model.vocabulary, storages)
                stack.callback(model.register_forward_hook(lambda *_: storages.keep()).remove)
            try:
                with storages:
                    yield found
            finally:
                step.engine = engine
                for model, vocabulary in zip(self._models, vocabularies, strict=True):
                    model.vocabulary = vocabulary
        self._tag(storages)
        found.update(by_category(storages))

    def write(self, found: dict[str, int], step: int, mesh: Mesh) -> None:
        """Writes what each rank measured in ``step`` into ``memory.json``; all ranks call it, rank 0 writes."""
        host = sum(buffer.numel() for model in self._models for buffer in host_buffers(model))
        names = [*found, "host"]
        rows = gather_numbers([*found.values(), host], mesh.world_group, self._device)
        if dist.get_rank(mesh.world_group) != 0 or self._directory is None:
            return
        ranks = [{"rank": rank, **dict(zip(names, map(int, row), strict=True))} for rank, row in enumerate(rows)]
        content = {"step": step, "device": self._device.type, "ranks": ranks}
        try:
            (self._directory / MEMORY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            _log.warning("%s is left out: %s", MEMORY, error)

    def _tag(self, storages: LiveStorages) -> None:
        """Tags what is there before the step, and again after it what the step has made."""
        for model in self._models:
            for parameter in model.parameters():
                storages.tag(parameter.detach(), "parameters")
            for buffer in host_buffers(model):
                storages.tag(buffer, "offloaded")
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    storages.tag(value, "optimizer")


def by_category(storages: LiveStorages) -> dict[str, int]:
    """Counts the bytes of each category at the peak; every storage is in one category."""
    time, peak = storages.peak()
    found = {**dict.fromkeys(CATEGORIES, 0), "peak": peak}
    for life in storages.lives:
        found[category_of(life)] += life.bytes_at(time)
    return found


class _Watched:
    """Wraps an engine so that gradients are known for what they are before the update uses them up."""

    def __init__(self, engine: Engine, models: Sequence[Decoder], storages: LiveStorages) -> None:
        self._engine, self._models, self._storages = engine, models, storages

    def accumulate(self, batches: Sequence[LocalBatch], scale: float) -> Tensor:
        return self._engine.accumulate(batches, scale)

    def evaluate(self, batches: Sequence[LocalBatch]) -> Tensor:
        return self._engine.evaluate(batches)

    def squared_norm(self) -> Tensor:
        for model in self._models:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    self._storages.tag(parameter.grad, "gradients")
        return self._engine.squared_norm()

    def update(self, lr: float, coefficient: float) -> None:
        self._engine.update(lr, coefficient)

    def discard(self) -> None:
        self._engine.discard()


class _WatchedVocabulary(Vocabulary):
    def __init__(self, vocabulary: Vocabulary, storages: LiveStorages) -> None:
        self._vocabulary, self._storages = vocabulary, storages

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self._vocabulary.logits(hidden, weight)

    def loss_sum(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        with self._storages.region("loss"):
            return self._vocabulary.loss_sum(hidden, weight, labels, chunk)


def is_measured(config: Config) -> bool:
    """Tells whether a step's memory is measured: ``logger.memory``, or null for all runs but compiled ones.

    Under a mode a compiled block would not be run.
    """
    return not config.train.compile if config.logger.memory is None else config.logger.memory
