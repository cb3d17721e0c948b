"""Runs ``longctx launch``: ranks on this machine, composed once and checked before a process starts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from longctx.config import Config, resolve
from longctx.errors import ConfigError
from longctx.launcher import env, failures, machine
from longctx.launcher.ranks.store import nameless_file
from longctx.launcher.ranks.supervisor import RankJob, RanksEnd, run_ranks
from longctx.launcher.resuming import Resume, resume_of
from longctx.launcher.resuming import add_arguments as add_resuming
from longctx.launcher.run_directory import claimed
from longctx.launcher.rundir.lock import launching
from longctx.launcher.rundir.records import CONFIG_FILE, FAILURES
from longctx.launcher.rundir.resumed_config import configuration
from longctx.launcher.start.checking import open_checked_directory
from longctx.launcher.stopping import answered_by_ranks
from longctx.reporting.teller import Teller


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx launch``."""
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="processes to start")
    add_resuming(parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks everything, starts the processes, and returns the first failing rank's exit code."""
    resume = resume_of(arguments)
    config = prepare(configuration(arguments.overrides, resume), arguments.nproc)
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
    worker = ["--config", str(directory / CONFIG_FILE), "--failures", str(reasons)]
    with answered_by_ranks():
        ended = _start(processes, directory, [*worker, *(resume.words if resume else [])])
    failure = failures.first_failure(reasons)
    # A rank whose peer was killed crashes on the broken connection; that traceback would blame the wrong one.
    if failure is not None and not (ended.killed and failure.traceback is not None):
        failures.report(failure)
        _tell_stopped(ended)
        return failure.exit_code
    if ended.message is not None:
        print(f"longctx: {ended.message}", file=sys.stderr)
    _tell_stopped(ended)
    return ended.status


def _tell_stopped(ended: RanksEnd) -> None:
    for rank in ended.stopped:
        print(f"longctx: rank {rank} was stopped, as by SIGSTOP: the others waited for it", file=sys.stderr)


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


def _start(processes: int, directory: Path, words: Sequence[str]) -> RanksEnd:
    """Runs the ranks, which meet by a file that only they have."""
    with nameless_file(directory) as store:
        command = [sys.executable, "-u", "-m", "longctx.launcher.worker", *words, "--store", str(store.fileno())]
        return run_ranks(
            RankJob(
                processes,
                command=lambda lifeline: [*command, "--lifeline", str(lifeline)],
                environment=lambda rank: env.launched_environment(env.RankEnvironment(rank, processes, rank)),
                handed=[store.fileno()],
                saving=lambda: _bytes_in(directory / "checkpoints"),
            )
        )


def _bytes_in(folder: Path) -> int:
    """Counts the bytes of unfinished checkpoints: they grow while one is written."""
    total = 0
    for file in folder.glob(".partial-*/**/*"):
        with contextlib.suppress(OSError):  # it has just been committed
            total += file.stat().st_size
    return total
