"""Tells at the end of a run what became of it, and how to go on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from longctx.checkpoint.directory import CheckpointDirectory
from longctx.config import Config
from longctx.reporting.best_loss import LOSSES, BestLoss
from longctx.reporting.units import duration


def ending(config: Config, run_dir: Path, summary: dict[str, Any], losses: BestLoss, views: dict[str, str]) -> str:
    """Writes the last lines of a run: its losses, what lies where, and the command that goes on.

    ``views``: what else shows the run, by name.
    """
    done, steps = summary["steps"], config.train.steps
    first = f"{summary['outcome']}: step {done} of {steps}, {duration(summary['seconds'])}"
    kept = CheckpointDirectory(run_dir / "checkpoints").steps()
    facts = {name.replace("_", " "): _loss(losses, name) for name in LOSSES if name in losses.last}
    if summary["skipped_updates"]:
        facts["skipped"] = f"{summary['skipped_updates']} updates, whose numbers were not finite"
    facts["checkpoint"] = str(run_dir / "checkpoints" / f"step-{kept[-1]}") if kept else "none"
    facts |= views
    if kept:
        more = f" train.steps={2 * steps}" if done >= steps else ""
        facts["to extend" if more else "to go on"] = f"{_command(config)} --resume={shlex.quote(str(run_dir))}{more}"
    return "\n".join([first, *(f"  {name:16}{value}" for name, value in facts.items())])


def _loss(losses: BestLoss, name: str) -> str:
    (last_step, last), (best_step, best) = losses.last[name], losses.best[name]
    return f"{last:.4f} in step {last_step}, lowest {best:.4f} in step {best_step}"


def _command(config: Config) -> str:
    parallel = config.parallel
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.sp * parallel.tp * parallel.pp
    if config.comm.backend == "sim" or ranks == 1:
        return "longctx train"
    if config.cluster.nodes > 1:
        return "longctx submit"
    return f"longctx launch --nproc {ranks}"
