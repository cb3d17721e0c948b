"""Runs the ranks of ``longctx generate``: on ``sim`` in this process, otherwise processes that this one starts."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.checkpoint.weights import load_weights
from longctx.comm import leave_world
from longctx.config import Config, simulated_world_size
from longctx.evaluate import Sampling, SequenceSharding, StagedModel, generate
from longctx.launcher import build
from longctx.launcher.processes import Workers, as_rank, join, run_gloo
from longctx.mesh import build_mesh
from longctx.parallel.core import core_attention, layout_of, linear_attention, mask_of
from longctx.parallel.data import compute_dtype
from longctx.parallel.pipeline import Pipeline

_IDS = "ids"  # the file in which the first rank leaves each token
_LIMIT = 30 * 24 * 3600.0  # seconds; how long it takes is the user's to say


@dataclass(frozen=True)
class GenerationJob:
    """Says what is generated. ``checkpoint``: where the weights come from; None for those of ``model.path``."""

    config: Config
    checkpoint: str | None
    prompt: list[int]
    max_tokens: int
    sampling: Sampling


def run_job(job: GenerationJob, tell: Callable[[int], None]) -> list[int]:
    """Returns the new ids; ``tell`` gets each as soon as it is known."""
    backend = job.config.comm.backend
    if backend == "sim" or (backend == "gloo" and simulated_world_size(job.config) == 1):
        found = build.simulate(job.config, run_rank, job, torch.device("cpu"), tell)
        return found[0]
    return _on_processes(job, tell)


def run_rank(job: GenerationJob, device: torch.device, tell: Callable[[int], None]) -> list[int]:
    """Runs one rank; every rank of the world calls it. The first tells what it gets."""
    config = job.config
    mesh = build_mesh(config.parallel, device.type)
    model = build.build_model(config, mesh, device, begins=job.checkpoint is None)
    if job.checkpoint is not None:
        load_weights(Path(job.checkpoint), model, config.to_dict())
    attention = core_attention(config, mesh, device)
    sharding = SequenceSharding(
        mesh.sequence_group,
        attention,
        layout_of(config),
        mask_of(config),
        config.attention.kernel,
        linear_attention(config, mesh),
        mesh.tensor.size(),
    )
    runs = StagedModel(model, mesh, compute_dtype(config.train.dtype)) if isinstance(model, Pipeline) else model
    first = dist.get_rank() == 0
    prompt = torch.tensor([job.prompt], dtype=torch.int64)

    def told(tokens: Tensor) -> None:
        if first:
            tell(int(tokens[0]))

    found = generate(runs, prompt, job.max_tokens, sharding, job.sampling, tell=told)
    ids: list[int] = found.tokens[0, len(job.prompt) :].tolist()
    return ids


def _on_processes(job: GenerationJob, tell: Callable[[int], None]) -> list[int]:
    """Runs one process per rank; the first leaves each token in a file, which this process reads meanwhile."""
    ids: list[int] = []
    with tempfile.TemporaryDirectory(prefix="longctx-generate-") as name:
        folder = Path(name)
        left = folder / _IDS
        left.touch()

        def look() -> None:
            lines = left.read_text(encoding="utf-8").split("\n")[:-1]  # what is not a whole line is not there yet
            for line in lines[len(ids) :]:
                ids.append(int(line))
                tell(ids[-1])

        words = json.dumps({**asdict(job), "config": job.config.to_dict()})
        workers = Workers(limit=_LIMIT, look=look)
        run_gloo("longctx.launcher.decoding.ranks", words, simulated_world_size(job.config), folder, workers)
        look()
    return ids


def worker(words: Sequence[str]) -> None:
    """Runs one rank of ``_on_processes``: the job as JSON, folder, rank, world."""
    given, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    sampling = Sampling(**{**given["sampling"], "stop_ids": tuple(given["sampling"]["stop_ids"])})
    job = GenerationJob(**{**given, "config": Config.from_dict(given["config"]), "sampling": sampling})
    device = join(folder, rank, world, job.config.comm.backend)
    with (folder / _IDS).open("a", encoding="utf-8", buffering=1) as file, build.deterministic(job.config):
        build.run_with_nodes(job.config, run_rank, job, device, lambda token: file.write(f"{token}\n"))
    dist.barrier()
    leave_world()


if __name__ == "__main__":
    sys.exit(as_rank(worker))
