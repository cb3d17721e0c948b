"""Runs one rank of a launched run: reads ``config.yaml``, trains, and ends with the error's exit code."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from longctx.config import Config, resolve
from longctx.errors import UsageError
from longctx.launcher import env, streams
from longctx.launcher.failures import run_recorded
from longctx.launcher.run_directory import read_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rank that the environment names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longctx.launcher.worker", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest committed checkpoint")
    parser.add_argument("--failures", type=Path, help="folder to leave the reason of a failure in")
    arguments = parser.parse_args(argv)

    def work() -> None:
        rank = env.read_rank()
        if rank is None:
            raise UsageError("a worker is started by torchrun or srun; start it with `longctx launch`")
        env.export_rank(rank)
        run(resolve(read_config(arguments.config), rank.world_size), arguments.resume)

    rank = env.read_rank()
    return run_recorded(rank.rank if rank else 0, arguments.failures, work)


def run(config: Config, resume: bool) -> None:
    """Trains as the rank that the environment names."""
    from longctx.launcher import build

    build.run_rank(config, resume=resume)


if __name__ == "__main__":
    streams.protect()
    env.share_cores(processes=1)
    # The command that was interrupted answers Ctrl-C; tracebacks of its ranks would say nothing more.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
