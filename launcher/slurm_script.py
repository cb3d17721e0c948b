"""Renders the sbatch script of a run.

Every value enters it quoted, but for ``cluster.prologue``, which is the user's own shell. Lines of #SBATCH are read by
Slurm, whose quoting knows no line breaks and takes backslashes as its own, so both are refused.
"""

from __future__ import annotations

import shlex
import string
import sys
import unicodedata
from pathlib import Path

import longctx
from longctx.config import Config
from longctx.config.sections.cluster import GPU_OPTIONS
from longctx.errors import ConfigError
from longctx.launcher.run_directory import directory_of
from longctx.launcher.signal_lead import signal_lead

SLURM = Path(longctx.__file__).parent / "slurm"


class _Template(string.Template):
    """Placeholders start with @@, since $ and @ belong to the shell."""

    delimiter = "@@"


def render(config: Config, cpus_per_task: int = 8) -> str:
    """Renders the sbatch script of a resolved configuration."""
    cluster, here = config.cluster, Path.cwd()
    directory = here / directory_of(config)
    for what, path in (("the working directory", here), ("run.dir", directory), ("Python's path", sys.executable)):
        _require_readable(what, str(path))
    lead, why = signal_lead(config, directory)
    options: dict[str, str | None] = {
        "job-name": config.run.name or "longctx",
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.devices),
        "cpus-per-task": str(cpus_per_task),
        "time": cluster.time_limit,
        "chdir": str(here),
        # Slurm expands % in file names; %j is the job's number.
        "output": str(directory).replace("%", "%%") + "/slurm-%j.log",
        "partition": cluster.partition,
        "account": cluster.account,
    }
    options = {name: text for name, text in options.items() if text is not None}
    environment = [SLURM / "common.env", SLURM / f"{config.comm.backend}.env"]
    return _Template((SLURM / "train.sbatch").read_text(encoding="utf-8")).substitute(
        options=_lines(options | _gpus(config) | cluster.sbatch_options),
        requeue="requeue" if cluster.requeue else "no-requeue",
        signal=f"USR1@{lead}",
        lead_reason=why,
        prologue="\n".join(cluster.prologue) or ":",
        environment="".join(file.read_text(encoding="utf-8") for file in environment).rstrip(),
        cpus_per_task=cpus_per_task,
        run_dir=shlex.quote(str(directory)),
        python=shlex.quote(sys.executable),
        goes_back="true" if cluster.requeue else "false",
    )


def _gpus(config: Config) -> dict[str, str | None]:
    """Returns what asks Slurm for one device for each rank of a node, unless the user's own options do."""
    cluster = config.cluster
    own = cluster.sbatch_options
    if config.comm.backend != "nccl" or cluster.gpus == "none":
        return {}
    if any(option in own and (option != "gres" or "gpu" in str(own[option])) for option in GPU_OPTIONS):
        return {}
    if cluster.gpus == "gpus-per-node":
        return {"gpus-per-node": str(cluster.devices)}
    if "gres" in own:
        raise ConfigError(
            f"cluster.sbatch.gres={own['gres']} names no GPU, and cluster.gpus=gres asks by the same option; set "
            f"cluster.sbatch.gres=[{own['gres']},gpu:{cluster.devices}]"
        )
    return {"gres": f"gpu:{cluster.devices}"}


def _lines(options: dict[str, str | None]) -> str:
    for name, text in options.items():
        _require_readable(f"--{name}", text or "")
    words = (f"--{name}" if text is None else f"--{name}={shlex.quote(text)}" for name, text in options.items())
    return "\n".join(f"#SBATCH {word}" for word in words)


def _require_readable(what: str, text: str) -> None:
    """Refuses text that a line of #SBATCH cannot hold: control characters, undecodable bytes, backslashes."""
    unsound = [one for one in text if one == "\\" or unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")]
    if unsound:
        raise ConfigError(
            f"{what} is {text!r}, and Slurm's scripts cannot hold {unsound[0]!r}; choose another name or folder"
        )
