"""Works out how long before the end of its time Slurm is to warn a job, from what its run has measured."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path

from longctx.checkpoint.directory import CheckpointDirectory
from longctx.config import Config
from longctx.reporting.metrics_file import METRICS, read_records

# Slurm looks for jobs to warn about once a minute, and kills at the limit.
_LOOKS = 60
# Two saves and a step, and what starting and ending them takes.
_SAVES, _ENDING = 2, 30
_UNMEASURED = 600
_LATEST = 50  # steps
_ROUNDED = 30


def signal_lead(config: Config, directory: Path) -> tuple[int, str]:
    """Returns the seconds, and the reason in words: as they are set, as they follow from the run, or generous."""
    if config.cluster.signal_seconds is not None:
        return config.cluster.signal_seconds, "cluster.signal_seconds"
    # A warning before half of the time has gone would cost more than it saves.
    most = max(config.cluster.seconds // 2, 1)
    step, save = _slowest_step(directory), CheckpointDirectory(directory / "checkpoints").save_seconds()
    if step is None or save is None:
        return min(_UNMEASURED, most), "nothing of this run is measured yet; cluster.signal_seconds=N sets it"
    needed = _LOOKS + step + _SAVES * save + _ENDING
    rounded = -int(-needed // _ROUNDED) * _ROUNDED
    return min(rounded, most), f"this run's steps take up to {step:.3g} s and its saves {save:.3g} s"


def _slowest_step(directory: Path) -> float | None:
    """Returns the longest of the latest steps' seconds; the first step of a run is no measure."""
    seconds = (record.get("step_seconds") for record in itertools.islice(read_records(directory / METRICS), 1, None))
    latest = deque((one for one in seconds if isinstance(one, int | float) and one >= 0), maxlen=_LATEST)
    return max(latest, default=None)
