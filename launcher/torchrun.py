"""``longctx launch``: torchrun on this machine, composed once and checked before a process starts.

torchrun runs inside this process, as its own command does, because its exception says which rank failed how;
its exit status says only that one did.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from longctx.config import Config, resolve
from longctx.errors import ConfigError
from longctx.launcher import env, failures, machine
from longctx.launcher.compose import compose
from longctx.launcher.run_directory import CONFIG_FILE, open_directory, refuse_occupied, with_directory

# Slurm announces the end of a job's time with USR1, which would kill an agent that does not handle it.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# How long ranks may take to write a checkpoint after a signal before they are killed.
SHUTDOWN_SECONDS = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``longctx launch``."""
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="processes to start")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest committed checkpoint of run.dir"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything, start the processes, and end with the first failing rank's exit code."""
    config = prepare(compose(arguments.overrides), arguments.nproc, arguments.resume)
    directory = open_directory(config, arguments.resume)
    env.share_cores(arguments.nproc)
    reasons = directory / "failures"
    failures.clear(reasons)
    worker = ["--config", str(directory / CONFIG_FILE), "--failures", str(reasons)]
    status = _torchrun(arguments.nproc, [*worker, *(["--resume"] if arguments.resume else [])])
    failure = failures.first(reasons)
    if failure is None:
        return status
    failures.report(failure)
    return failure.exit_code


def prepare(config: Config, processes: int, resume: bool) -> Config:
    """Everything that can be refused before a process starts."""
    if processes < 1:
        raise ConfigError(f"--nproc {processes} must be at least 1")
    if config.comm.backend == "sim":
        raise ConfigError(
            "comm=sim holds all ranks in one process: use `longctx train comm=sim ...`, "
            "or launch with comm=gloo or comm=nccl"
        )
    config = with_directory(resolve(config, processes))
    machine.require(config, processes)
    refuse_occupied(config, resume)
    from longctx.launcher import build

    build.preflight(config, resume=resume)
    return config


def _torchrun(processes: int, worker: Sequence[str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Its reports say less than the ranks' own failures, at greater length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    options = [
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--signals-to-handle={SIGNALS}",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--max-restarts=0",
        "--module",
        "longctx.launcher.worker",
    ]
    try:
        torchrun.run(torchrun.parse_args([*options, *worker]))
    except ChildFailedError as error:
        return _child_status(error)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _child_status(error: object) -> int:
    """The status of a rank that died without a word, as a shell would give it."""
    _, failure = error.get_first_failure()  # type: ignore[attr-defined]
    code = failure.exitcode
    status = 128 - code if code < 0 else code
    how = f"was killed by {failure.signal_name()}" if code < 0 else f"ended with status {code}"
    print(f"longctx: rank {failure.rank or failure.local_rank} {how} and left no message", file=sys.stderr)
    return status
