"""Runs a benchmark on its ranks: those of torchrun or srun, or processes that this one starts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.bench.timing import Report, silent
from longctx.comm import leave_world
from longctx.config import Config
from longctx.errors import ConfigError, LongctxError
from longctx.launcher import build, env
from longctx.launcher.processes import Workers, join, run_gloo
from longctx.launcher.progress import progress, to_file
from longctx.launcher.ranks.world import init_distributed

PATIENCE = 3600.0  # seconds for the processes that are started here

JsonObject = dict[str, Any]
Measure = Callable[[Config, JsonObject, torch.device, Report], JsonObject]


def refuse_sim(config: Config, command: str) -> None:
    """Refuses simulated ranks, which take turns in one process."""
    if config.comm.backend == "sim":
        raise ConfigError(
            f"comm=sim: its ranks take turns in one process, so that their times mean nothing; use comm=gloo with "
            f"`longctx {command}`, or `longctx verify` for exactness and bytes"
        )


def at_least_one(option: str, value: int, default: int) -> None:
    """Refuses a count below 1, naming the option and its default."""
    if value < 1:
        raise ConfigError(f"{option} {value} must be at least 1; {default} is the default")


def run_as_rank(
    rank: env.RankEnvironment, command: str, prepare: Callable[[], tuple[Config, JsonObject]], measure: Measure
) -> JsonObject | int:
    """Runs one rank of torchrun or srun; returns what the first one is to print, elsewhere an exit status.

    All ranks return the status where all refuse. ``prepare``: the resolved configuration and the job, after everything
    that can be refused.
    """
    try:
        config, job = prepare()
        env.export_rank(rank)
    except LongctxError as error:
        if rank.rank == 0:
            raise
        # Every rank refuses a wrong configuration for the same reason; one message is enough.
        return error.exit_code
    with init_distributed(config) as device, build.deterministic(config):
        if rank.rank:
            measure(config, job, device, silent)
            return 0
        with progress(f"longctx {command}") as report:
            return measure(config, job, device, report)


def run_on_processes(module: str, config: Config, command: str, world: int, job: JsonObject) -> JsonObject:
    """Runs ``module`` on ``world`` processes of this machine, which meet by a file.

    Returns what the first one found.
    """
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as name, progress(f"longctx {command}") as report:
        report(0, 0, f"starting {world} processes")
        work = json.dumps({"config": config.to_dict(), "job": job})
        run_gloo(module, work, world, Path(name), Workers(limit=PATIENCE, report=report))
        found: JsonObject = json.loads((Path(name) / "found.json").read_text(encoding="utf-8"))
        return found


def worker(words: Sequence[str], measure: Measure) -> None:
    """Runs one process of ``run_on_processes``: configuration and job as JSON, folder, rank, world."""
    work, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    config = Config.from_dict(work["config"])
    device = join(folder, rank, world, config.comm.backend)
    with build.deterministic(config):
        found = build.run_with_nodes(config, measure, config, work["job"], device, to_file(folder, rank))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    dist.barrier()
    leave_world()


def oversubscription(config: Config, world: int) -> str | None:
    """Returns a warning where ranks that compute on the processor are more than its cores."""
    cores = len(os.sched_getaffinity(0))
    if config.comm.backend == "nccl" or world <= cores:
        return None
    return f"{world} processes on {cores} cores: times measure the scheduler as well"
