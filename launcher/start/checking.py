"""Checks a run before its ranks meet, with its directory held, and says what takes how long."""

from __future__ import annotations

from pathlib import Path

from longctx.config import Config
from longctx.launcher import machine
from longctx.launcher.resuming import Resume, is_rewound, refuse_mixing
from longctx.launcher.run_directory import open_directory
from longctx.reporting.teller import Teller


def open_checked_directory(config: Config, resume: Resume | None, processes: int) -> Path:
    """Tells the run's directory, refuses all that can be refused before ranks meet, then writes the configuration.

    ``processes``: how many of them this machine runs.
    """
    Teller().say(f"run directory: {config.run.dir}")
    refuse_mixing(config, resume)
    teller = Teller(silent=not config.logger.progress)
    # Nothing before this line needs torch, so that the directory is told at once.
    with teller.stage("loading PyTorch"):
        machine.require(config, processes)
        from longctx.launcher import build
    with teller.after("configuration and data are checked"):
        step = build.preflight(config, resume)
    return open_directory(config, step, is_rewound(resume))
