"""Runs the start-up canary: one tiny step with the run's own parts, against the dense single-device step.

Silent wrong masks and scales are the standing bug of sequence parallelism. So before its first step every run trains
one layer per pipeline stage on short sequences. It uses its own mesh, strategy, layout, head counts, kernel,
arithmetic, recompute and mask. Rank 0 compares outputs, loss and gradients with attention by its definition, in fp64.
Compilation is left out: it alone would take longer than a canary may.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.errors import NumericsError
from longctx.mesh import Mesh
from longctx.parallel.data import compute_dtype
from longctx.parallel.pipeline import Pipeline, run_forward
from longctx.sequence import Batch, LocalBatch, unshard
from longctx.train.canary.comparison import gradient_errors, relative, tolerance_of
from longctx.train.canary.reference import StepTensors, dense_model, dense_step
from longctx.train.canary.sample import make_batches, shrink
from longctx.train.canary.tiny_run import TinyRun


@dataclass(frozen=True)
class CanaryVerdict:
    """What the canary found; ``worst`` is the tensor with the largest relative error, ``error``.

    ``gradient_scale``: length of the run's gradient along the dense one, 1 when right. A mean in place of a sum shows
    here as one over the number of ranks.
    """

    passed: bool
    worst: str
    error: float
    tolerance: float
    gradient_scale: float
    seconds: float


def run_canary(config: Config, mesh: Mesh, device: torch.device) -> dict[str, Any]:
    """Returns the canary's verdict as plain JSON values; every rank calls it.

    Random generators are left as they were. Raises ``NumericsError`` on all ranks, naming the worst tensor, its error
    and the tolerance.
    """
    started = time.perf_counter()
    tiny = shrink(replace(config, train=replace(config.train, seed=0)))  # the same for every run
    with _generators_kept(device):
        batches = make_batches(tiny, mesh.data_size)
        found = _parallel_step(tiny, mesh, device, batches[mesh.data_rank])
        names = ["outputs", "loss", *found.gradients]
        numbers = [0.0, 0.0, 0.0]  # place of the worst tensor, its error, the scale
        if dist.get_rank(mesh.world_group) == 0:
            errors, scale = compare(found, dense_step(dense_model(tiny, device), tiny, batches, device))
            name = max(names, key=lambda name: errors[name])
            numbers = [float(names.index(name)), errors[name], scale]
        worst, error, scale = gather_numbers(numbers, mesh.world_group, device)[0]
    tolerance = tolerance_of(config.train.dtype, tiny.model.layers)
    seconds = time.perf_counter() - started
    verdict = CanaryVerdict(error <= tolerance, names[int(worst)], error, tolerance, scale, seconds)
    if not verdict.passed:
        raise NumericsError(_explain(verdict, config))
    return asdict(verdict)


def compare(found: StepTensors, expected: StepTensors) -> tuple[dict[str, float], float]:
    """Returns the relative error of each tensor and the gradient's scale.

    An error is infinite for what is not finite.
    """
    square = sum(float(g.square().sum()) for g in expected.gradients.values())
    along = sum(float((found.gradients[n] * g).sum()) for n, g in expected.gradients.items())
    errors = {
        "outputs": relative(found.outputs, expected.outputs),
        "loss": relative(found.loss, expected.loss),
        **gradient_errors(found.gradients, expected.gradients),
    }
    return errors, along / square


def _parallel_step(config: Config, mesh: Mesh, device: torch.device, batches: Sequence[Batch]) -> StepTensors:
    """Returns outputs of all ranks in natural order, global loss and gradients, all in fp64 on every rank."""
    run = TinyRun.of(config, mesh, device)
    local = [run.sharder(batch) for batch in batches]
    with torch.no_grad():
        outputs = [_whole(outputs_of(run.model, batch, config, mesh), batch, mesh) for batch in local]
    result = run.step.gradients(local)
    assert result.loss is not None, "the canary's sequences have labels"
    return StepTensors(torch.cat(outputs), torch.tensor(result.loss, dtype=torch.float64), run.gradients())


def outputs_of(model: nn.Module, batch: LocalBatch, config: Config, mesh: Mesh) -> Tensor:
    """Returns logits ``[B, T/SP, V]`` of this rank's tokens, in a pipeline on the ranks of all stages."""
    if isinstance(model, Pipeline):
        logits = run_forward(model, batch, mesh, compute_dtype(config.train.dtype))
    else:
        logits = model(batch.tokens, batch.positions, batch.plan.handle)
    return logits.double()


def _whole(local: Tensor, batch: LocalBatch, mesh: Mesh) -> Tensor:
    """Turns ``[B, T/SP, V]`` of each rank into ``[B, S, V]`` of each data-parallel group, one behind the other."""
    ranks = mesh.tokens.size()
    everyone = local.new_empty(ranks * len(local), *local.shape[1:])
    dist.all_gather_single(everyone, local.contiguous(), group=mesh.token_group)
    shards = everyone.chunk(ranks)
    groups = [shards[first : first + mesh.sequence_size] for first in range(0, ranks, mesh.sequence_size)]
    return torch.cat([unshard(list(group), batch.plan) for group in groups])


def _explain(verdict: CanaryVerdict, config: Config) -> str:
    attention, parallel = config.attention, config.parallel
    return (
        f"canary: {verdict.worst} differs from the dense single-device step by {verdict.error:.1e} "
        f"(relative), tolerance {verdict.tolerance:.0e} for train.dtype={config.train.dtype}; gradient scale "
        f"{verdict.gradient_scale:.4f}, must be 1. This run would train on wrong numbers: "
        f"attention={attention.strategy}, kernel={attention.kernel}, "
        f"dp_replicate={parallel.dp_replicate}, dp_shard={parallel.dp_shard}, sp={parallel.sp}, "
        f"tp={parallel.tp}, pp={parallel.pp}. Try attention.kernel=dense to tell kernel from communication, and "
        "report it; train.canary=false starts regardless"
    )


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
