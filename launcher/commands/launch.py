"""Runs ``longctx launch``: torchrun on this machine, composed once and checked before a process starts.

torchrun runs inside this process, as its own command does. Its exception says which rank failed how; its exit status
says only that one did.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from longctx.config import Config, resolve
from longctx.errors import ConfigError
from longctx.launcher import env, failures, machine
from longctx.launcher.compose import compose
from longctx.launcher.resuming import Resume, resume_of
from longctx.launcher.resuming import add_arguments as add_resuming
from longctx.launcher.run_directory import CONFIG_FILE, FAILURES, claimed
from longctx.launcher.run_lock import launching
from longctx.launcher.start.checking import open_checked_directory
from longctx.launcher.stopping import answered_by_ranks
from longctx.reporting.teller import Teller

# Slurm announces the end of a job's time with USR1, which would kill an agent that does not handle it.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# How long ranks may take to write a checkpoint after a signal before they are killed.
SHUTDOWN_SECONDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx launch``."""
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="processes to start")
    add_resuming(parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks everything, starts the processes, and returns the first failing rank's exit code."""
    resume = resume_of(arguments)
    config = prepare(compose(arguments.overrides), arguments.nproc)
    with claimed(config, launching) as config:
        return _launched(config, arguments.nproc, resume)


def _launched(config: Config, processes: int, resume: Resume | None) -> int:
    """Runs the ranks of a run whose directory this command holds; returns the exit code."""
    directory = open_checked_directory(config, resume, processes)
    env.share_cores(processes)
    reasons = directory / FAILURES
    failures.clear_failures(reasons)
    if config.logger.progress:
        Teller().say(f"starting {processes} processes")
    worker = ["--config", str(directory / CONFIG_FILE), "--failures", str(reasons), "--launched"]
    with answered_by_ranks():
        ended = _torchrun(processes, [*worker, *(resume.words if resume else [])])
    failure = failures.first_failure(reasons)
    # A rank whose peer was killed crashes on the broken connection; that traceback would blame the wrong one.
    if failure is not None and not (ended.killed and failure.traceback is not None):
        failures.report(failure)
        return failure.exit_code
    if ended.message is not None:
        print(f"longctx: {ended.message}", file=sys.stderr)
    return ended.status


def prepare(config: Config, processes: int) -> Config:
    """Returns the resolved configuration; refuses what asks for other processes or another machine."""
    if processes < 1:
        raise ConfigError(f"--nproc {processes} must be at least 1")
    if config.comm.backend == "sim":
        raise ConfigError(
            "comm=sim holds all ranks in one process: use `longctx train comm=sim ...`, "
            "or launch with comm=gloo or comm=nccl"
        )
    machine.require_nodes(config)
    return resolve(config, processes)


@dataclass(frozen=True)
class _Ended:
    """What torchrun knows of the end: a shell's status, and a message where a rank may have left none."""

    status: int
    message: str | None = None
    killed: bool = False  # a signal from outside ended a rank, which explains the crashes of the others


@dataclass(frozen=True)
class _Exit:
    """How one rank's process failed, negative for a signal as ``subprocess`` has it, and when torchrun saw it."""

    rank: int
    status: int
    seconds: int


def _torchrun(processes: int, worker: Sequence[str]) -> _Ended:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = [
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--signals-to-handle={SIGNALS}",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--max-restarts=0",
        "--module",
        "longctx.launcher.worker",
    ]
    # Its log says less than the ranks' own failures, at greater length; this process logs nothing else.
    logging.disable(logging.ERROR)
    try:
        torchrun.run(torchrun.parse_args([*options, *worker]))
    except ChildFailedError as error:
        # In the order in which torchrun saw them end; the last ones may be those that it ended itself.
        return _why([_Exit(rank, end.exitcode, end.timestamp) for rank, end in error.failures.items()])
    except SignalException as stopped:
        return _Ended(128 + stopped.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return _Ended(0)


def _why(failed: Sequence[_Exit]) -> _Ended:
    """Returns the end that the exits of failed ranks tell, the first one first."""
    if any(end.status == -signal.SIGINT for end in failed):
        return _Ended(failures.INTERRUPTED)
    cause = next((end for end in failed if _killed_from_outside(end, failed[0])), failed[0])
    if cause.status >= 0:
        return _Ended(cause.status, f"rank {cause.rank} ended with status {cause.status} and left no message")
    number = signal.Signals(-cause.status)
    memory = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
    message = f"rank {cause.rank} was killed by {number.name}{memory}; --resume goes on from the newest checkpoint"
    # NCCL's watchdog aborts a rank that has lost its peer, whose own words then say more.
    return _Ended(failures.CRASH, message, killed=number != signal.SIGABRT)


def _killed_from_outside(end: _Exit, first: _Exit) -> bool:
    """Returns whether ``end`` is a kill that torchrun did not send.

    torchrun ends the other ranks with TERM, and late with KILL.
    """
    return end.status == -signal.SIGKILL and end.seconds - first.seconds < SHUTDOWN_SECONDS / 2
