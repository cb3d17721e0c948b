"""Runs ``longctx submit``: a checked run as a Slurm job, which reads the ``config.yaml`` that is written here.

Every value enters the script quoted, and ``sbatch`` is called with an argument list. So a job named ``$(touch x)`` is a
job with an odd name and nothing more.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import longctx
from longctx.config import Config, resolve
from longctx.errors import ConfigError, NotAvailableError, StorageError
from longctx.launcher import streams
from longctx.launcher.compose import compose
from longctx.launcher.resuming import add_arguments as add_resuming
from longctx.launcher.resuming import refuse_mixing, resume_of
from longctx.launcher.run_directory import (
    claimed,
    committed_steps,
    directory_by_the_clock,
    directory_of,
    in_directory,
    open_directory,
)
from longctx.launcher.run_lock import launching

SLURM = Path(longctx.__file__).parent / "slurm"


class _Template(string.Template):
    """Placeholders start with @@, since $ and @ belong to the shell."""

    delimiter = "@@"


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
    config = prepare(compose(arguments.overrides))
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
        # The job goes on from what it finds when it starts; until then this is what it is to go on from.
        steps = committed_steps(directory_of(config)) if resume else []
        directory = open_directory(config, steps[-1] if steps else None)
        return _submit(sbatch, directory, render(config, arguments.cpus_per_task))


def prepare(config: Config) -> Config:
    """Resolves ``config`` for the cluster's world."""
    if config.comm.backend == "sim":
        raise ConfigError("comm=sim needs one process, not a Slurm job: use `longctx train comm=sim ...`")
    config = resolve(config, config.cluster.nodes * config.cluster.devices)
    from longctx.launcher import build

    # Kernel and data are the job's machines' to check; the strategy needs no machine, and every rank would refuse it.
    build.preflight_attention(config)
    return config


def render(config: Config, cpus_per_task: int = 8) -> str:
    """Renders the sbatch script of a resolved configuration."""
    cluster, directory = config.cluster, directory_of(config).absolute()
    site = [("partition", cluster.partition), ("account", cluster.account)]
    environment = [SLURM / "common.env", SLURM / f"{config.comm.backend}.env"]
    template = (SLURM / "train.sbatch").read_text(encoding="utf-8")
    return _Template(template).substitute(
        job_name=shlex.quote(config.run.name or "longctx"),
        nodes=cluster.nodes,
        tasks_per_node=cluster.devices,
        cpus_per_task=cpus_per_task,
        time_limit=shlex.quote(cluster.time_limit),
        working_directory=shlex.quote(str(Path.cwd())),
        # Slurm expands % in file names; %j is the job's number.
        log=shlex.quote(str(directory).replace("%", "%%") + "/slurm-%j.log"),
        site_options="\n".join(f"#SBATCH --{name}={shlex.quote(value)}" for name, value in site if value),
        environment="".join(file.read_text(encoding="utf-8") for file in environment).rstrip(),
        run_dir=shlex.quote(str(directory)),
        python=shlex.quote(sys.executable),
    )


def _submit(sbatch: str, directory: Path, script: str) -> int:
    path = directory / "train.sbatch"
    try:
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
    finished = subprocess.run([sbatch, str(path)], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise NotAvailableError(f"sbatch refused {path}: {finished.stderr.strip()}")
    print(finished.stdout.strip())
    return 0
