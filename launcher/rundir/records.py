"""Keeps what was done in a run's directory: no later attempt overwrites it, each moves it aside."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from longctx.checkpoint.directory import CheckpointDirectory

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS = "metrics.jsonl"
FAILURES = "failures"
MODEL_SOURCE = "model_source"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
# What an attempt leaves beside its checkpoints. All of it is told apart by name from that of a later attempt.
RECORDS = (
    CONFIG_FILE,
    "environment.json",
    METRICS,
    "memory.json",
    "report.html",
    "trace.json",
    FAILURES,
    MODEL_SOURCE,
    TOKENIZER,
)


def committed_steps(directory: Path) -> list[int]:
    """Lists the steps of a run's committed checkpoints, ascending."""
    return CheckpointDirectory(directory / CHECKPOINTS).steps()


def keep_attempt(directory: Path, besides: str | None = None) -> None:
    """Gives other names to the records of an attempt that left no checkpoint: ``metrics.attempt-1.jsonl``.

    ``besides``: a name that stays, such as that of the configuration which the next attempt reads.
    """
    left = [directory / name for name in RECORDS if name != besides and holds(directory / name)]
    number = 1
    while any(directory.glob(f"*.attempt-{number}*")):
        number += 1
    for path in left:
        path.rename(path.with_name(f"{path.stem}.attempt-{number}{path.suffix}"))


def set_later_aside(directory: Path, step: int) -> None:
    """Moves the checkpoints after ``step`` into a folder of their own, with what was recorded up to them.

    Left where they are, they would be resumed from first, and mix two courses of one run. The folder is a run's
    directory itself: ``--resume=run/later-than-step-4`` goes on with them.
    """
    later = [each for each in committed_steps(directory) if each > step]
    if not later:
        return
    aside = _free_name(directory / "later", f"than-step-{step}", joined="-")
    (aside / CHECKPOINTS).mkdir(parents=True)
    for name in (CONFIG_FILE, METRICS):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, aside / name)
    for name in (MODEL_SOURCE, TOKENIZER):
        if (directory / name).is_dir():
            shutil.copytree(directory / name, aside / name)
    source = CheckpointDirectory(directory / CHECKPOINTS)
    for each in reversed(later):  # the newest first: whatever a crash leaves, the rest is still one course
        source.path(each).rename(aside / CHECKPOINTS / f"step-{each}")
    names = ", ".join(f"step-{each}" for each in later)
    _log.warning("checkpoints after step %d (%s) are now in %s, as a run of their own", step, names, aside)


def keep_before(directory: Path, step: int, text: str) -> None:
    """Keeps what a resume from ``step`` will write anew, under names such as ``config.before-step-4.yaml``.

    ``text``: the configuration from now on; the earlier one is kept if it differs.
    """
    config = directory / CONFIG_FILE
    changes = config.is_file() and config.read_bytes() != text.encode()
    for path in (*([config] if changes else []), directory / "environment.json"):
        if path.is_file():
            # A copy, not a rename: at no time is the run without its configuration.
            shutil.copyfile(path, _free_name(path, f"before-step-{step}"))
    if holds(directory / FAILURES):
        (directory / FAILURES).rename(_free_name(directory / FAILURES, f"before-step-{step}"))


def _free_name(path: Path, label: str, joined: str = ".") -> Path:
    """Returns ``config.before-step-4.yaml`` for ``config.yaml``, or with a number behind it where that is taken."""
    number, chosen = 1, path.with_name(f"{path.stem}{joined}{label}{path.suffix}")
    while os.path.lexists(chosen):
        number += 1
        chosen = path.with_name(f"{path.stem}{joined}{label}-{number}{path.suffix}")
    return chosen


def holds(path: Path) -> bool:
    """Tells whether something lies at ``path``: an empty folder holds nothing."""
    return any(path.iterdir()) if path.is_dir() and not path.is_symlink() else os.path.lexists(path)
