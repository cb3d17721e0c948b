"""Reads how a run is to start: afresh, from a checkpoint, or from one if there is one; the same for every command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from longctx.config import Config
from longctx.errors import UsageError
from longctx.launcher.hydra.overrides import quoted
from longctx.launcher.run_directory import directory_of, refuse_occupied
from longctx.launcher.rundir.records import committed_steps

RESUME = "--resume"


@dataclass(frozen=True)
class Resume:
    """Says from which checkpoint a run goes on.

    ``step``: None for the newest. ``required``: False for a run that starts where there is none.
    """

    step: int | None = None
    required: bool = True

    @property
    def words(self) -> list[str]:
        """Returns the options of a command that say the same."""
        if not self.required:
            return ["--auto-resume"]
        return [RESUME, *([] if self.step is None else ["--step", str(self.step)])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a run starts."""
    parser.add_argument(
        RESUME,
        action="store_true",
        help="go on from the newest committed checkpoint of run.dir; --resume=DIR: of DIR",
    )
    parser.add_argument("--step", type=int, metavar="N", help="with --resume: from the checkpoint of step N")
    parser.add_argument(
        "--auto-resume", action="store_true", help="go on if run.dir has a committed checkpoint, start if it has none"
    )


def resume_of(arguments: argparse.Namespace) -> Resume | None:
    """Returns what the options say; None for a start. Raises ``UsageError`` where they contradict one another."""
    if arguments.resume and arguments.auto_resume:
        raise UsageError("--resume goes on, --auto-resume goes on or starts: leave one out")
    if arguments.step is not None and not arguments.resume:
        raise UsageError(f"--step {arguments.step} says from where --resume goes on: add --resume")
    if arguments.step is not None and arguments.step < 0:
        raise UsageError(f"--step {arguments.step} must be the number of a step, at least 0")
    if arguments.auto_resume:
        return Resume(required=False)
    return Resume(arguments.step) if arguments.resume else None


def spelled_out(words: Sequence[str]) -> list[str]:
    """Writes ``--resume=DIR`` as the ``--resume run.dir=DIR`` that it stands for."""
    spelled: list[str] = []
    for word in words:
        option, equals, directory = word.partition("=")
        if option != RESUME or not equals:
            spelled.append(word)
            continue
        if not directory:
            raise UsageError(f"{word} names no directory; write {RESUME}=DIR, or {RESUME} with run.dir=DIR")
        spelled += [RESUME, f"run.dir={quoted(directory)}"]
    named = [word for word in spelled if word.startswith("run.dir=")]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} both name the run's directory; leave one out")
    return spelled


def goes_on(config: Config, resume: Resume | None) -> bool:
    """Tells whether the run goes on from a checkpoint, as far as this process sees its directory."""
    return resume is not None and (resume.required or bool(committed_steps(directory_of(config))))


def is_rewound(resume: Resume | None) -> bool:
    """Tells whether the user chose the step, so that later checkpoints are not to be resumed from."""
    return resume is not None and resume.step is not None


def refuse_mixing(config: Config, resume: Resume | None) -> None:
    """Refuses to start a run in a directory that holds another one, unless the options say what is to become of it."""
    if resume is None:
        refuse_occupied(config)
