"""Runs one rank of a launched run: reads ``config.yaml``, trains, and ends with the error's exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from longctx.config import Config, resolve
from longctx.errors import UsageError
from longctx.launcher import env, streams
from longctx.launcher.failures import record, run_recorded
from longctx.launcher.ranks.lifeline import end_with_launcher, end_with_parent
from longctx.launcher.resuming import Resume, add_arguments, goes_on, resume_of
from longctx.launcher.run_directory import claimed, directory_of, read_config
from longctx.launcher.rundir.lock import writing
from longctx.launcher.rundir.records import CONFIG_FILE, keep_attempt
from longctx.launcher.stopping import listening


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rank that the environment names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longctx.launcher.worker", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's config.yaml")
    add_arguments(parser)
    parser.add_argument("--failures", type=Path, help="folder to leave the reason of a failure in")
    parser.add_argument("--store", type=int, help="from `longctx launch`: open file in which its ranks meet")
    parser.add_argument("--lifeline", type=int, help="from `longctx launch`: pipe that it holds while it lives")
    arguments = parser.parse_args(argv)
    follow(arguments.lifeline)

    def work() -> None:
        rank = env.read_rank()
        if rank is None:
            raise UsageError("a worker is started by torchrun or srun; start it with `longctx launch`")
        launched = arguments.store is not None  # by a command that holds run.dir for its ranks
        if not launched:
            env.export_rank(rank)
        config, resume = resolve(read_config(arguments.config), rank.world_size), resume_of(arguments)
        lock = partial(writing, launched=launched)
        with claimed(config, lock) if rank.rank == 0 else nullcontext():
            if rank.rank == 0 and not launched and not goes_on(config, resume):
                keep_attempt(directory_of(config), besides=CONFIG_FILE)
            run(config, resume, arguments.store)

    rank = env.read_rank()
    number = rank.rank if rank else 0
    with listening(partial(record, number, arguments.failures), for_good=argv is None):
        return run_recorded(number, arguments.failures, work)


def follow(lifeline: int | None = None) -> None:
    """Ends this process with whoever started it as a rank, if that is known to outlive its ranks."""
    if lifeline is not None:
        end_with_launcher(lifeline)
    elif env.has_parent_to_follow():
        end_with_parent()


def run(config: Config, resume: Resume | None, store: int | None) -> None:
    """Trains as the rank that the environment names. ``store``: from `longctx launch`, which has checked the data."""
    from longctx.launcher import build

    build.run_rank(config, resume, store)


if __name__ == "__main__":
    streams.protect()
    env.share_cores(processes=1)
    sys.exit(main())
