"""Trains a shrunken run for a few steps on its mesh and on one rank, for ``longctx verify --mesh``.

The mesh trains with the run's own parts: strategy, layout, kernel, mask, head counts, arithmetic, recompute,
micro-batches, clipping, optimizer. One device trains from the same weights on the same sequences in fp64. Its
attention is by definition, without plan, tile, chunked loss or recompute. What differs between them beyond rounding is
a mistake. Compilation is left out: it alone would take longer than all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.comm.rank_numbers import gather_numbers
from longctx.config import DEGREES, Config
from longctx.config.pipeline import nearest_microbatches
from longctx.mesh import Mesh, build_mesh
from longctx.sequence import Batch
from longctx.train.batch_sharder import layout_of
from longctx.train.canary.comparison import gradient_errors, relative, tolerance_of
from longctx.train.canary.reference import dense_model, dense_step
from longctx.train.canary.sample import make_batches, shrink
from longctx.train.canary.tiny_run import TinyRun
from longctx.train.learning_rate import LearningRate
from longctx.train.optimizer import build_optimizer

LAYERS = 2  # one that frees its gathered weights after the forward pass, and the last, which does not
LARGEST_HEAD = 16  # channels
LARGEST_MICRO_BATCH = 4  # sequences
MOST_MICRO_BATCHES = 4  # accumulation is there from the second on
# AdamW divides each gradient by its own size: where that is nearly zero, rounding alone would decide about a step
# of the full learning rate. The tiny run's gradients are about as large as this, which keeps its updates smooth.
SMALLEST_EPS = 1e-2
LARGEST_LR = 1e-2  # above it, twenty steps in bf16 make more of rounding than a mistake would


@dataclass(frozen=True)
class StepParity:
    """Loss and gradient norm of one step on the mesh and on one rank, and their relative differences."""

    step: int
    loss: float
    loss_one_rank: float
    loss_difference: float
    grad_norm: float
    grad_norm_one_rank: float
    grad_norm_difference: float


@dataclass(frozen=True)
class ParityReport:
    """What the parity check found; all differences are relative.

    ``gradients``: by parameter, of the first step; ``weights``: by parameter, after the last. ``worst``: what differs
    most, by ``difference``.
    """

    backend: str
    mesh: dict[str, int]
    strategy: str
    layout: str
    dtype: str
    model: dict[str, int]
    batch: dict[str, int]
    steps: list[StepParity]
    gradients: dict[str, float]
    weights: dict[str, float]
    worst: str
    difference: float
    tolerance: float
    passed: bool


@dataclass
class TrainingRecord:
    """What some steps of training gave: gradients of the first one, weights after the last, all in fp64."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def shrink_for_parity(config: Config, steps: int) -> Config:
    """Shrinks a resolved run as for the canary, but with its own micro-batches and for ``steps`` steps.

    Warm-up, decay and the chunks of the loss shrink in proportion, so that all still matter. AdamW's eps grows, and
    its learning rate is bounded.
    """
    tiny = shrink(config)
    train, parallel = config.train, config.parallel
    groups = parallel.dp_replicate * parallel.dp_shard
    count = min(MOST_MICRO_BATCHES, train.global_batch // (groups * train.micro_batch))
    count = nearest_microbatches(parallel.pp_schedule, parallel.pp, count)
    rows = min(LARGEST_MICRO_BATCH, train.micro_batch)
    chunk = max(tiny.train.loss_chunk, train.loss_chunk * tiny.data.seq_len // config.data.seq_len)
    optim = config.optim.settled(train.steps)
    linear = [(f"{of}_head_dim", getattr(tiny.model.linear, f"{of}_head_dim")) for of in ("key", "value")]
    warmup, decay = (
        None if whole is None else -(-whole * steps // train.steps) for whole in (optim.warmup_steps, optim.decay_steps)
    )
    return replace(
        tiny,
        model=replace(
            tiny.model,
            layers=max(LAYERS, tiny.model.layers),
            head_dim=min(LARGEST_HEAD, tiny.model.head_dim),
            linear=replace(tiny.model.linear, **{name: size and min(LARGEST_HEAD, size) for name, size in linear}),
        ),
        optim=replace(
            tiny.optim,
            lr=min(LARGEST_LR, tiny.optim.lr),
            warmup_steps=warmup,
            decay_steps=decay,
            eps=max(SMALLEST_EPS, tiny.optim.eps),
        ),
        train=replace(tiny.train, steps=steps, micro_batch=rows, global_batch=groups * rows * count, loss_chunk=chunk),
    )


def run_parity(config: Config, device: torch.device) -> tuple[bool, ParityReport | None]:
    """Returns whether mesh and one rank agree, on every rank, and the report, on rank 0.

    ``config``: from ``shrink_for_parity``.
    """
    mesh = build_mesh(config.parallel, device.type)
    found = train_on_mesh(config, mesh, device)
    report = None
    if dist.get_rank(mesh.world_group) == 0:
        report = compare(config, found, train_on_one_rank(config, device))
    flags = [0.0 if report is None else float(report.passed)]
    return bool(gather_numbers(flags, mesh.world_group, device)[0][0]), report


def train_on_mesh(config: Config, mesh: Mesh, device: torch.device) -> TrainingRecord:
    """Trains the shrunken run on its mesh; every rank of the world calls it."""
    run = TinyRun.of(config, mesh, device)
    schedule = LearningRate(config.optim, config.train.steps)
    record = TrainingRecord([], [], {}, {})
    for step in range(1, config.train.steps + 1):
        batches = [run.sharder(batch) for batch in _batches(config, step)[mesh.data_rank]]
        if not record.gradients:
            # The step proper uses them up, so the first one is computed twice.
            run.step.gradients(batches)
            record.gradients = run.gradients()
            run.step.engine.discard()
        result = run.step(batches, schedule.advance(), step)
        assert result.loss is not None, "its sequences have labels"
        record.losses.append(result.loss)
        record.norms.append(result.grad_norm)
    record.weights = run.weights()
    return record


def train_on_one_rank(config: Config, device: torch.device) -> TrainingRecord:
    """Trains the same run without a mesh: dense attention, fp64, torch's own clipping."""
    model = dense_model(config, device)
    optimizer = build_optimizer(model, config.optim)
    schedule = LearningRate(config.optim, config.train.steps)
    largest = float("inf") if config.optim.grad_clip is None else config.optim.grad_clip
    record = TrainingRecord([], [], {}, {})
    for step in range(1, config.train.steps + 1):
        expected = dense_step(model, config, _batches(config, step), device)
        record.gradients = record.gradients or {name: g.clone() for name, g in expected.gradients.items()}
        record.losses.append(float(expected.loss))
        record.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), largest)))
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    record.weights = {name: p.detach() for name, p in model.named_parameters()}
    return record


def compare(config: Config, found: TrainingRecord, expected: TrainingRecord) -> ParityReport:
    """Reports how a mesh (``found``) and one rank (``expected``) differ."""
    steps = [
        StepParity(number, loss, one_loss, _difference(loss, one_loss), norm, one_norm, _difference(norm, one_norm))
        for number, (loss, one_loss, norm, one_norm) in enumerate(
            zip(found.losses, expected.losses, found.norms, expected.norms, strict=True), start=1
        )
    ]
    gradients = gradient_errors(found.gradients, expected.gradients)
    weights = {name: relative(found.weights[name], weight) for name, weight in expected.weights.items()}
    differences = {f"gradient of {name} in step 1": error for name, error in gradients.items()}
    differences |= {f"weight {name} after step {len(steps)}": error for name, error in weights.items()}
    differences |= {f"loss of step {one.step}": one.loss_difference for one in steps}
    differences |= {f"gradient norm of step {one.step}": one.grad_norm_difference for one in steps}
    worst = max(differences, key=lambda name: differences[name])
    tolerance = tolerance_of(config.train.dtype, config.model.layers)
    sizes = {name: getattr(config.model, name) for name in ("layers", "dim", "heads", "kv_heads", "head_dim")}
    return ParityReport(
        backend=config.comm.backend,
        mesh={name: getattr(config.parallel, name) for name in DEGREES},
        strategy=config.attention.strategy,
        layout=layout_of(config).name,
        dtype=config.train.dtype,
        model={**sizes, "vocab_size": config.model.vocab_size},
        batch={
            "seq_len": config.data.seq_len,
            "micro_batch": config.train.micro_batch,
            "micro_batches": _micro_batches(config),
        },
        steps=steps,
        gradients=gradients,
        weights=weights,
        worst=worst,
        difference=differences[worst],
        tolerance=tolerance,
        passed=differences[worst] <= tolerance,
    )


def _difference(found: float, expected: float) -> float:
    return relative(torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64))


def _batches(config: Config, step: int) -> list[list[Batch]]:
    parallel = config.parallel
    return make_batches(config, parallel.dp_replicate * parallel.dp_shard, _micro_batches(config), step - 1)


def _micro_batches(config: Config) -> int:
    parallel, train = config.parallel, config.train
    return train.global_batch // (parallel.dp_replicate * parallel.dp_shard * train.micro_batch)
