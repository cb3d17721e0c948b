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
from longctx.launcher.resuming import Resume, add_arguments, goes_on, resume_of
from longctx.launcher.run_directory import CONFIG_FILE, claimed, directory_of, keep_attempt, read_config
from longctx.launcher.run_lock import writing
from longctx.launcher.stopping import listening


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rank that the environment names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longctx.launcher.worker", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's config.yaml")
    add_arguments(parser)
    parser.add_argument("--launched", action="store_true", help="`longctx launch` holds run.dir for its ranks")
    parser.add_argument("--failures", type=Path, help="folder to leave the reason of a failure in")
    arguments = parser.parse_args(argv)

    def work() -> None:
        rank = env.read_rank()
        if rank is None:
            raise UsageError("a worker is started by torchrun or srun; start it with `longctx launch`")
        env.export_rank(rank)
        config, resume = resolve(read_config(arguments.config), rank.world_size), resume_of(arguments)
        lock = partial(writing, launched=arguments.launched)
        with claimed(config, lock) if rank.rank == 0 else nullcontext():
            if rank.rank == 0 and not arguments.launched and not goes_on(config, resume):
                keep_attempt(directory_of(config), besides=CONFIG_FILE)
            run(config, resume)

    rank = env.read_rank()
    number = rank.rank if rank else 0
    with listening(partial(record, number, arguments.failures), for_good=argv is None):
        return run_recorded(number, arguments.failures, work)


def run(config: Config, resume: Resume | None) -> None:
    """Trains as the rank that the environment names."""
    from longctx.launcher import build

    build.run_rank(config, resume)


if __name__ == "__main__":
    streams.protect()
    env.share_cores(processes=1)
    sys.exit(main())
