"""``longctx verify --mesh`` trains a shrunken copy of the configured run on its mesh and on one rank."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.comm import leave_world
from longctx.config import Config, resolve, simulated_world_size
from longctx.errors import ConfigError, LongctxError
from longctx.launcher import build, env, machine
from longctx.launcher.compose import compose
from longctx.launcher.processes import as_rank, join, run_gloo
from longctx.launcher.progress import progress
from longctx.launcher.ranks.world import init_distributed
from longctx.train.canary.parity import ParityReport, StepParity, run_parity, shrink_for_parity

PASSED, FAILED = 0, 70
STEPS = 5
SHOWN = 5  # parameters of each kind in the report, the worst first; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh", action="store_true", help="train a shrunken copy of the configured run on its mesh and on one rank"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"with --mesh: optimizer steps; default: {STEPS}, or 20 with --all"
    )


def run(arguments: argparse.Namespace) -> int:
    steps = steps_of(arguments, STEPS)
    config = with_dtype(compose(arguments.overrides), arguments.dtype)
    rank = env.read_rank() if config.comm.backend != "sim" else None
    if rank is not None:
        return _as_rank(config, steps, rank, arguments.json)
    with progress("longctx verify --mesh") as tell:
        tell(0, 0, f"{steps} steps on the mesh and on one rank")
        report = on_this_machine(config, steps)
    _show(report, arguments.json)
    return PASSED if report.passed else FAILED


def steps_of(arguments: argparse.Namespace, default: int) -> int:
    """Returns the number of steps that the command line asks for, at least 1."""
    steps: int = default if arguments.steps is None else arguments.steps
    if steps < 1:
        raise ConfigError(f"--steps {steps} must be at least 1; {default} is the default")
    return steps


def with_dtype(config: Config, dtype: str | None) -> Config:
    """Returns the configuration with the arithmetic that the command line asks for; None leaves it as it is."""
    return config if dtype is None else replace(config, train=replace(config.train, dtype=dtype))


def on_this_machine(config: Config, steps: int) -> ParityReport:
    """Checks a mesh in this process, or on processes that this one starts."""
    machine.require_nodes(config)
    world = simulated_world_size(config)
    config = prepare(config, steps, world, local=world)
    if config.comm.backend != "sim":
        return _on_processes(config, steps, world)
    tiny = shrink_for_parity(config, steps)
    report = build.simulate(tiny, run_parity, tiny, torch.device("cpu"))[0][1]
    assert report is not None, "rank 0 has the report"
    return report


def prepare(config: Config, steps: int, world: int, local: int) -> Config:
    """Resolves the run, after all that ``longctx train`` would refuse but for its data; ``local``: ranks here."""
    config = resolve(config, world)
    machine.require_devices(config, local)
    for one in (config, shrink_for_parity(config, steps)):
        build.preflight_attention(one)
        build.preflight_kernel(one)
    return config


def _on_processes(config: Config, steps: int, world: int) -> ParityReport:
    """Runs one process per rank, which meet by a file; rank 0 leaves the report as JSON."""
    with tempfile.TemporaryDirectory(prefix="longctx-verify-") as name:
        job = json.dumps({"config": config.to_dict(), "steps": steps})
        run_gloo("longctx.launcher.verify.mesh", job, world, Path(name))
        return _read(json.loads((Path(name) / "report.json").read_text()))


def _read(fields: dict[str, Any]) -> ParityReport:
    return ParityReport(**{**fields, "steps": [StepParity(**step) for step in fields["steps"]]})


def worker(words: Sequence[str]) -> None:
    """Runs one rank of ``_on_processes``: resolved configuration and steps as JSON, folder, rank, world."""
    job, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    tiny = shrink_for_parity(Config.from_dict(job["config"]), job["steps"])
    device = join(folder, rank, world, tiny.comm.backend)
    with build.deterministic(tiny):
        _, report = build.run_with_nodes(tiny, run_parity, tiny, device)
    if report is not None:
        (folder / "report.json").write_text(json.dumps(asdict(report)))
    dist.barrier()
    leave_world()


def _as_rank(config: Config, steps: int, rank: env.RankEnvironment, json_wanted: bool) -> int:
    """Runs one rank of torchrun or srun; the first one prints, all end alike."""
    try:
        machine.require_nodes(config, rank.world_size)
        tiny = shrink_for_parity(prepare(config, steps, rank.world_size, rank.local_rank + 1), steps)
        env.export_rank(rank)
    except LongctxError as error:
        if rank.rank == 0:
            raise
        # Every rank refuses a wrong configuration for the same reason; one message is enough.
        return error.exit_code
    with init_distributed(tiny) as device, build.deterministic(tiny):
        passed, report = run_parity(tiny, device)
    if report is not None:
        _show(report, json_wanted)
    return PASSED if passed else FAILED


def as_json(report: ParityReport) -> dict[str, Any]:
    """Returns the report as plain values."""
    plain: dict[str, Any] = _plain(asdict(report))
    return plain


def _show(report: ParityReport, json_wanted: bool) -> None:
    print(json.dumps(as_json(report), allow_nan=False) if json_wanted else text(report))


def _plain(value: Any) -> Any:
    """Returns the value with null for numbers that JSON lacks: a difference that is not finite."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(report: ParityReport) -> str:
    """Writes the report for people."""
    model, batch = report.model, report.batch
    degrees = " × ".join(f"{name} {size}" for name, size in report.mesh.items() if size > 1) or "one rank"
    lines = [
        f"{degrees} on {report.backend}: {report.strategy} on {report.layout}, {report.dtype}",
        f"shrunk to {model['layers']} layers of width {model['dim']}, {model['heads']}/{model['kv_heads']} heads of "
        f"{model['head_dim']}, {batch['micro_batches']} micro-batches of {batch['micro_batch']} × "
        f"{batch['seq_len']} tokens on each data-parallel group",
        "",
        "step      loss  one rank  difference   gradient norm  one rank  difference",
    ]
    lines += [
        f"{one.step:4}  {one.loss:8.5f}  {one.loss_one_rank:8.5f}  {one.loss_difference:10.1e}   "
        f"{one.grad_norm:13.5f}  {one.grad_norm_one_rank:8.5f}  {one.grad_norm_difference:10.1e}"
        for one in report.steps
    ]
    lines += _worst(f"gradients of step 1, the worst of {len(report.gradients)}", report.gradients)
    lines += _worst(f"weights after step {len(report.steps)}, the worst of {len(report.weights)}", report.weights)
    verdict = "passed" if report.passed else "FAILED"
    lines += ["", f"{verdict}: {report.worst} differs by {report.difference:.1e}, tolerance {report.tolerance:.0e}"]
    return "\n".join(lines)


def _worst(title: str, differences: dict[str, float]) -> list[str]:
    ordered = sorted(differences.items(), key=lambda pair: -pair[1])
    return ["", title, *(f"  {name:32} {difference:.1e}" for name, difference in ordered[:SHOWN])]


if __name__ == "__main__":
    sys.exit(as_rank(worker))
