"""Runs ``longctx train``: one process of the trainer, or a whole simulated world in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from longctx.config import Config, resolve, simulated_world_size
from longctx.errors import ConfigError, LongctxError
from longctx.launcher import env, machine, streams
from longctx.launcher.ranks.meeting import RelayedError
from longctx.launcher.resuming import Resume, resume_of
from longctx.launcher.resuming import add_arguments as add_resuming
from longctx.launcher.run_directory import claimed, with_directory
from longctx.launcher.rundir.resumed_config import configuration
from longctx.launcher.start.checking import open_checked_directory
from longctx.launcher.stopping import listening
from longctx.launcher.worker import follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx train``."""
    add_resuming(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains as the rank that torchrun or srun named, or alone, or as a simulated world."""
    resume = resume_of(arguments)
    rank = env.read_rank() or env.RankEnvironment(rank=0, world_size=1, local_rank=0)
    try:
        config = configuration(arguments.overrides, resume)
        if config.comm.backend == "sim":
            _require_alone(rank)
            _simulate(config, resume)
            return 0
        config = _prepare(config, rank)
    except LongctxError as error:
        if rank.rank == 0:
            raise
        # Where all ranks refuse for the same reason, one message is enough; where this one alone does, rank 0 tells.
        _leave_word(error)
        return error.exit_code
    follow()
    try:
        _train(config, rank, resume)
    except RelayedError as error:
        if rank.rank == 0:
            raise
        return error.exit_code
    return 0


def _train(config: Config, rank: env.RankEnvironment, resume: Resume | None) -> None:
    """Trains as ``rank``. The first one checks the data and writes the directory while the others wait for it."""
    with ExitStack() as held:
        if rank.world_size == 1:  # nobody waits: the directory is told before PyTorch is loaded
            config = held.enter_context(_opened(config, resume))
        from longctx.launcher import build
        from longctx.launcher.ranks.world import meet

        meeting = held.enter_context(meet(config, {"resume": resume.words if resume else []}))
        if rank.rank == 0 and rank.world_size > 1:
            config = held.enter_context(_opened(config, resume))
        build.train_with(meeting, config, resume, checked=rank.rank == 0)


def _leave_word(error: LongctxError) -> None:
    from longctx.launcher.ranks.world import leave_word

    leave_word(error)


def _require_alone(rank: env.RankEnvironment) -> None:
    """Refuses to simulate the whole world once more in each of several processes."""
    if rank.world_size > 1:
        raise ConfigError(
            f"comm=sim holds all ranks in one process, and this is one of {rank.world_size}: use comm=gloo or "
            "comm=nccl, or `longctx train comm=sim ...` without a launcher"
        )


def _simulate(config: Config, resume: Resume | None) -> None:
    machine.require_nodes(config)
    config = resolve(config, simulated_world_size(config))
    with _opened(config, resume) as config:
        from longctx.launcher import build

        build.run_sim(config, resume)


@contextmanager
def _opened(config: Config, resume: Resume | None) -> Iterator[Config]:
    """Holds the run's directory, with the configuration in it, after all that can be refused before ranks meet."""
    with claimed(config) as config:
        open_checked_directory(config, resume, processes=1)
        yield config


def _prepare(config: Config, rank: env.RankEnvironment) -> Config:
    """Returns the resolved configuration; refuses what each rank can refuse by itself."""
    # Only a rank that torchrun or srun named can have others on further nodes.
    machine.require_nodes(config, rank.world_size)
    config = _resolve(config, rank.world_size)
    if config.run.dir is None and rank.world_size > 1 and env.run_id() is None:
        raise ConfigError(
            f"run.dir=null: {rank.world_size} processes must agree on one directory and their launcher gave "
            "no id; set run.dir, or start with `longctx launch` or `torchrun --standalone`"
        )
    run_id = env.run_id()
    env.export_rank(rank)
    if rank.rank:
        machine.require(config, processes=rank.local_rank + 1)
    return config if run_id is None or rank.world_size == 1 else with_directory(config, run_id)


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
    from longctx.launcher import cli

    streams.protect()
    with listening(cli.tell, for_good=True):
        sys.exit(cli.main(["train", *sys.argv[1:]]))
