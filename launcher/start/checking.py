"""Checks a run before its ranks meet, with its directory held, and says what takes how long."""

from __future__ import annotations

from pathlib import Path

from longctx.config import Config
from longctx.launcher import machine
from longctx.launcher.resuming import Resume, is_rewound, refuse_mixing
from longctx.launcher.run_directory import open_directory
from longctx.launcher.rundir.records import MODEL_SOURCE
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
    directory = open_directory(config, step, is_rewound(resume))
    if step is None:
        keep_model_source(config, directory)
        from longctx.launcher.rundir.kept_tokenizer import keep_tokenizer

        keep_tokenizer(config, directory)
    return directory


def keep_model_source(config: Config, directory: Path) -> None:
    """Keeps in the run what an export needs of the directory, or of the run, that its weights come from."""
    from longctx.huggingface.writing.source import keep_source

    begun = Path(config.init.from_).parent.parent / MODEL_SOURCE if config.init.from_ is not None else None
    if begun is not None and begun.is_dir():
        keep_source(begun, directory / MODEL_SOURCE)
    elif config.model.path is not None:
        keep_source(Path(config.model.path), directory / MODEL_SOURCE)
