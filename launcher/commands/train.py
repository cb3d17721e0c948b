"""Runs ``longctx train``: one process of the trainer, or a whole simulated world in this process."""

from __future__ import annotations

import argparse
import sys

from longctx.config import Config, resolve, simulated_world_size
from longctx.errors import ConfigError, LongctxError
from longctx.launcher import env, machine, streams
from longctx.launcher.compose import compose
from longctx.launcher.run_directory import open_directory, refuse_occupied, with_directory
from longctx.launcher.worker import run as run_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx train``."""
    parser.add_argument("--resume", action="store_true", help="go on from the newest committed checkpoint of run.dir")


def run(arguments: argparse.Namespace) -> int:
    """Trains as the rank that torchrun or srun named, or alone, or as a simulated world."""
    config = compose(arguments.overrides)
    if config.comm.backend == "sim":
        _simulate(config, arguments.resume)
        return 0
    rank = env.read_rank() or env.RankEnvironment(rank=0, world_size=1, local_rank=0)
    try:
        config = _prepare(config, rank, arguments.resume)
    except LongctxError as error:
        if rank.rank == 0:
            raise
        # Every rank refuses a wrong configuration for the same reason; one message is enough.
        return error.exit_code
    run_rank(config, arguments.resume)
    return 0


def _simulate(config: Config, resume: bool) -> None:
    machine.require_nodes(config)
    config = with_directory(resolve(config, simulated_world_size(config)))
    machine.require(config, processes=1)
    refuse_occupied(config, resume)
    from longctx.launcher import build

    build.preflight(config, resume=resume)
    open_directory(config, resume)
    build.run_sim(config, resume=resume)


def _prepare(config: Config, rank: env.RankEnvironment, resume: bool) -> Config:
    """Refuses all that can be refused before this rank meets the others, and returns the resolved configuration."""
    # Only a rank that torchrun or srun named can have others on further nodes.
    machine.require_nodes(config, rank.world_size)
    config = _resolve(config, rank.world_size)
    if config.run.dir is None and rank.world_size > 1 and env.run_id() is None:
        raise ConfigError(
            f"run.dir=null: {rank.world_size} processes must agree on one directory and their launcher gave "
            "no id; set run.dir, or start with `longctx launch` or `torchrun --standalone`"
        )
    config = with_directory(config, env.run_id() if rank.world_size > 1 else None)
    env.export_rank(rank)
    machine.require(config, processes=rank.local_rank + 1)
    if rank.rank == 0:
        refuse_occupied(config, resume)
        from longctx.launcher import build

        build.preflight(config, resume=resume)
        open_directory(config, resume)
    return config


def _resolve(config: Config, world_size: int) -> Config:
    try:
        return resolve(config, world_size)
    except ConfigError as error:
        needed = simulated_world_size(config)
        if world_size > 1 or needed == 1:
            raise
        raise ConfigError(f"{error}; for {needed} processes: `longctx launch --nproc {needed} ...`") from None


def main() -> None:
    """Runs ``python -m longctx.train``, which is the same as ``longctx train``."""
    from longctx.launcher.cli import main as command_line

    streams.protect()
    sys.exit(command_line(["train", *sys.argv[1:]]))
