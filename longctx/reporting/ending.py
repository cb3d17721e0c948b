"""Tells at the end of a run what became of it, and how to go on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from longctx.checkpoint.directory import CheckpointDirectory
from longctx.reporting.best_loss import LOSSES, BestLoss
from longctx.reporting.units import duration


def ending(
    run_dir: Path, steps: int, summary: dict[str, Any], losses: BestLoss, views: dict[str, str], command: str
) -> str:
    """Writes the last lines of a run: its losses, what lies where, and the command that goes on.

    ``steps``: of the whole run. ``views``: what else shows the run, by name. ``command``: starts such a run.
    """
    done = summary["steps"]
    first = f"{summary['outcome']}: step {done} of {steps}, {duration(summary['seconds'])}"
    kept = CheckpointDirectory(run_dir / "checkpoints").steps()
    facts = {name.replace("_", " "): _loss(losses, name) for name in LOSSES if name in losses.last}
    if summary["skipped_updates"]:
        facts["skipped"] = f"{summary['skipped_updates']} updates, whose numbers were not finite"
    facts["checkpoint"] = str(run_dir / "checkpoints" / f"step-{kept[-1]}") if kept else "none"
    facts |= views
    if kept:
        more = f" train.steps={2 * steps}" if done >= steps else ""
        facts["to extend" if more else "to go on"] = f"{command} --resume={shlex.quote(str(run_dir))}{more}"
    return "\n".join([first, *(f"  {name:16}{value}" for name, value in facts.items())])


def _loss(losses: BestLoss, name: str) -> str:
    (last_step, last), (best_step, best) = losses.last[name], losses.best[name]
    return f"{last:.4f} in step {last_step}, lowest {best:.4f} in step {best_step}"
