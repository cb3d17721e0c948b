"""Runs forward and backward of a directory's model on the ranks of a mesh, for ``longctx verify --hf``.

On ``sim`` they are in this process, otherwise processes that this one starts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longctx.comm import leave_world
from longctx.config import Config, simulated_world_size
from longctx.launcher import build
from longctx.launcher.processes import as_rank, join, run_gloo
from longctx.mesh import build_mesh
from longctx.parallel.data import full_tensor
from longctx.parallel.pipeline import Pipeline
from longctx.sequence import IGNORE, Batch, Documents, unshard
from longctx.train.batch_sharder import BatchSharder, plan_of_batch
from longctx.train.canary.check import outputs_of
from longctx.train.optimizer import build_optimizer
from longctx.train.step import TrainStep


@dataclass(frozen=True)
class RankPart:
    """What one rank holds of the answer.

    ``logits``: ``[B, T/SP, V]`` of each microbatch, from one rank of those that have the same tokens. ``gradients``: in
    full by our names, from one rank of those that have the same weights. ``place``: its data-parallel group, and its
    place in the sequence group.
    """

    place: tuple[int, int]
    loss: float
    logits: list[Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Computed:
    """What the mesh computed: ``logits`` ``[B, S, V]`` in natural order, mean loss, gradients by our names."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def compute(config: Config, tokens: Tensor, documents: Sequence[int]) -> Computed:
    """Computes int64 tokens ``[B, S]`` on the mesh; every row is packed with documents of these lengths."""
    packed = list(documents)
    if config.comm.backend == "sim":
        parts = build.simulate(config, run_rank, config, tokens, packed, torch.device("cpu"))
    else:
        parts = _on_processes(config, tokens, packed)
    return _joined(config, parts, len(tokens), packed)


def run_rank(config: Config, tokens: Tensor, documents: list[int], device: torch.device) -> RankPart:
    """Runs one rank; every rank of the world calls it."""
    mesh = build_mesh(config.parallel, device.type)
    model = build.build_model(config, mesh, device)
    step = TrainStep(build.engine_of(model, build_optimizer(model, config.optim), config, mesh), mesh, device)
    sharder = BatchSharder.of(config, mesh, device)
    local = [sharder(batch) for batch in _batches(config, tokens, documents)[mesh.data_rank]]
    with torch.no_grad():
        logits = [outputs_of(model, batch, config, mesh).cpu() for batch in local]
    result = step.gradients(local)
    assert result.loss is not None, "a document has more than one token"
    own = model.own_parameters() if isinstance(model, Pipeline) else model.named_parameters()
    speaks = mesh.leads_tensor and mesh.tokens.get_local_rank() == 0
    gradients = {}
    for name, parameter in own:
        assert parameter.grad is not None, f"{name} takes part in the loss"
        whole = full_tensor(parameter.grad)
        if speaks:
            gradients[name] = whole.cpu()
    place = mesh.data_rank, mesh.sequence_rank
    return RankPart(place, result.loss, logits if mesh.counts_tokens else [], gradients)


def _batches(config: Config, tokens: Tensor, documents: list[int]) -> list[list[Batch]]:
    """Returns the microbatches of each data-parallel group, filled up with rows that have no label."""
    train, groups = config.train, config.parallel.dp_replicate * config.parallel.dp_shard
    whole = torch.cat([tokens, tokens[:1].expand(train.global_batch - len(tokens), -1)])
    labels = torch.full_like(whole, IGNORE)
    start = 0
    for length in documents:
        labels[: len(tokens), start : start + length - 1] = tokens[:, start + 1 : start + length]
        start += length
    packing = (Documents.from_lengths(documents),) * train.micro_batch
    micro = [
        Batch(*pair, packing)
        for pair in zip(whole.split(train.micro_batch), labels.split(train.micro_batch), strict=True)
    ]
    each = len(micro) // groups
    return [micro[group * each : (group + 1) * each] for group in range(groups)]


def _joined(config: Config, parts: Sequence[RankPart], rows: int, documents: list[int]) -> Computed:
    packing = (Documents.from_lengths(documents),) * config.train.micro_batch
    plan = plan_of_batch(config, packing, sum(documents))
    speaking = sorted((part for part in parts if part.logits), key=lambda part: part.place)
    logits = []
    for first in range(0, len(speaking), config.parallel.sp):
        group = speaking[first : first + config.parallel.sp]
        logits += [unshard(list(shards), plan) for shards in zip(*(part.logits for part in group), strict=True)]
    gradients = {name: whole for part in parts for name, whole in part.gradients.items()}
    return Computed(torch.cat(logits)[:rows], parts[0].loss, gradients)


def _on_processes(config: Config, tokens: Tensor, documents: list[int]) -> list[RankPart]:
    """Runs one process per rank, which meet by a file and leave their parts as safetensors."""
    world = simulated_world_size(config)
    with tempfile.TemporaryDirectory(prefix="longctx-verify-") as name:
        folder = Path(name)
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        job = json.dumps({"config": config.to_dict(), "documents": documents})
        run_gloo("longctx.launcher.verify.directory_ranks", job, world, folder)
        return [_read(folder / f"rank-{rank}.safetensors") for rank in range(world)]


def _save(part: RankPart, path: Path) -> None:
    tensors = {f"grad.{name}": whole.contiguous() for name, whole in part.gradients.items()}
    tensors |= {f"logits.{number}": local.contiguous() for number, local in enumerate(part.logits)}
    save_file(tensors, path, {"place": json.dumps(part.place), "loss": repr(part.loss)})


def _read(path: Path) -> RankPart:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        about = file.metadata()
    logits = [tensors[f"logits.{number}"] for number in range(sum(name.startswith("logits.") for name in tensors))]
    gradients = {name.removeprefix("grad."): one for name, one in tensors.items() if name.startswith("grad.")}
    group, rank = json.loads(about["place"])
    return RankPart((group, rank), float(about["loss"]), logits, gradients)


def worker(words: Sequence[str]) -> None:
    """Runs one rank of ``_on_processes``: resolved configuration and documents as JSON, folder, rank, world."""
    job, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    config = Config.from_dict(job["config"])
    device = join(folder, rank, world, config.comm.backend)
    with safe_open(folder / "tokens.safetensors", framework="pt") as file:
        tokens = file.get_tensor("tokens")
    with build.deterministic(config):
        part = build.run_with_nodes(config, run_rank, config, tokens, job["documents"], device)
    _save(part, folder / f"rank-{rank}.safetensors")
    dist.barrier()
    leave_world()


if __name__ == "__main__":
    sys.exit(as_rank(worker))
