"""Runs ``longctx submit``: a checked run as a Slurm job, which reads the ``config.yaml`` that is written here.

Every value enters the script quoted, and ``sbatch`` is called with an argument list. So a job named ``$(touch x)`` is a
job with an odd name and nothing more. ``launcher/slurm_script.py`` renders it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from longctx.config import Config, resolve
from longctx.errors import ConfigError, NotAvailableError, StorageError
from longctx.launcher import env, streams
from longctx.launcher.resuming import Resume, goes_on, is_rewound, refuse_mixing, resume_of
from longctx.launcher.resuming import add_arguments as add_resuming
from longctx.launcher.run_directory import (
    claimed,
    directory_by_the_clock,
    directory_of,
    in_directory,
    open_directory,
)
from longctx.launcher.rundir.lock import launching
from longctx.launcher.rundir.records import committed_steps
from longctx.launcher.rundir.resumed_config import configuration
from longctx.launcher.slurm_script import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx submit``."""
    add_resuming(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    parser.add_argument(
        "--cpus-per-task", type=int, default=8, metavar="N", help="cores of each rank (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Renders the job, and submits it unless ``--dry-run`` was given."""
    resume = resume_of(arguments)
    config = prepare(configuration(arguments.overrides, resume))
    if arguments.cpus_per_task < 1:
        raise ConfigError(f"--cpus-per-task {arguments.cpus_per_task} must be at least 1")
    if arguments.dry_run:
        named = config if config.run.dir else in_directory(config, directory_by_the_clock())
        streams.write_text(render(named, arguments.cpus_per_task))
        streams.require_written()
        return 0
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise NotAvailableError("sbatch is not on this machine's PATH; `longctx submit --dry-run` prints the script")
    with claimed(config, launching) as config:
        config = in_directory(config, directory_of(config).absolute())
        refuse_mixing(config, resume)
        script = render(config, arguments.cpus_per_task)
        # The job goes on from what it finds when it starts; until then this is what it is to go on from.
        directory = open_directory(config, _step(config, resume), is_rewound(resume))
        return _submit(sbatch, directory, script)


def prepare(config: Config) -> Config:
    """Resolves ``config`` for the cluster's world."""
    if config.comm.backend == "sim":
        raise ConfigError("comm=sim needs one process, not a Slurm job: use `longctx train comm=sim ...`")
    if config.comm.backend == "nccl" and config.cluster.devices_per_node is None:
        raise ConfigError(
            "comm=nccl with cluster.devices_per_node=null: a job asks Slurm for a number of GPUs on each node; set "
            "cluster=slurm, which means 8, or cluster.devices_per_node=N"
        )
    config = resolve(config, config.cluster.nodes * config.cluster.devices)
    from longctx.launcher import build
    from longctx.launcher.preflight import Facts, device_of_job, look

    # Kernel and data are the job's machines' to check; the strategy needs no machine, and every rank would refuse it.
    build.preflight_attention(config)
    look(Facts(config, device=device_of_job(config)))
    return config


def _step(config: Config, resume: Resume | None) -> int | None:
    """Returns the step from which the job will go on, as things stand; None for a start."""
    if resume is None or not goes_on(config, resume):
        return None
    steps = committed_steps(directory_of(config))
    chosen = resume.step if resume.step is not None else max(steps, default=None)
    if chosen is None or chosen not in steps:
        raise StorageError(
            f"{' '.join(resume.words)}: {directory_of(config)} has no such checkpoint; committed steps: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    return chosen


def _submit(sbatch: str, directory: Path, script: str) -> int:
    path = directory / "train.sbatch"
    try:
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
    outside = env.outside_of_jobs()
    finished = subprocess.run([sbatch, str(path)], env=outside, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise NotAvailableError(f"sbatch refused {path}: {finished.stderr.strip()}")
    print(finished.stdout.strip())
    return 0
