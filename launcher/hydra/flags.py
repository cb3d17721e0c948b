"""Understands the flags of Hydra's that people know, on every command that takes overrides, and refuses the others.

Each refusal is one line that says what to write instead.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Collection, Sequence

import yaml

from longctx.config import Config, resolve, simulated_world_size
from longctx.errors import UsageError
from longctx.launcher.hydra.overrides import SEARCH_PATH, quoted

_MULTIRUN = ("-m", "--multirun")
_FILES = "own options go into a folder, --config-dir DIR, and a whole experiment into a file, recipe=FILE.yaml"
_SHOWN = "--cfg job shows the configuration"
_REFUSED = {
    "-cn": _FILES,
    "--config-name": _FILES,
    "-cp": _FILES,
    "--config-path": _FILES,
    "--info": _SHOWN,
    "-i": _SHOWN,
    "-p": _SHOWN,
    "--package": _SHOWN,
    "--hydra-help": "--help shows what this command takes",
    "-r": "a command runs without it",
    "--run": "a command runs without it",
    "-sc": "there is no completion of words",
    "--shell-completion": "there is no completion of words",
    "--experimental-rerun": "--resume run.dir=DIR goes on, recipe=DIR/config.yaml starts the same again",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that are understood."""
    parser.add_argument("-c", "--cfg", choices=["job"], help="print the configuration as YAML and do nothing else")
    parser.add_argument(
        "--resolve", action="store_true", help="with --cfg: also what depends on the number of processes and steps"
    )
    parser.add_argument(
        "-cd", "--config-dir", metavar="DIR", help="a folder with own options, as GROUP/NAME.yaml (group=NAME)"
    )


def refuse_others(command: str, words: Sequence[str], own: Collection[str] = ()) -> None:
    """Refuses flags that have no meaning here; ``own``: those that the command gives one. Raises ``UsageError``."""
    for word in words:
        flag = word.partition("=")[0]
        if flag in _MULTIRUN:
            raise UsageError(f"{flag}: one command is one run; loop in the shell: {_loop(command, words)}")
        if flag in _REFUSED and flag not in own:
            raise UsageError(f"{flag} is a flag of Hydra's that is not used here: {_REFUSED[flag]}")


def _loop(command: str, words: Sequence[str]) -> str:
    """Writes the loop of a shell that takes the place of several values in one command."""
    several = next((word for word in words if "," in word.partition("=")[2].strip("[]")), "optim.lr=1e-3,3e-3")
    key, _, values = several.partition("=")
    others = [shlex.quote(word) for word in words if word not in (*_MULTIRUN, several)]
    own = ["run.dir=runs/a-$value"] if command in ("train", "launch", "submit") else []
    line = " ".join(["longctx", command, *others, f"{key}=$value", *own])
    return f"for value in {' '.join(map(shlex.quote, values.split(',')))}; do {line}; done"


def require_nothing(parser: argparse.ArgumentParser) -> None:
    """Lets ``--cfg`` be asked for without options that only running needs."""
    for action in parser._actions:
        action.required = False


def with_own_folder(arguments: argparse.Namespace) -> list[str]:
    """Returns the overrides, the user's folder of options among them."""
    if arguments.config_dir is None:
        return list(arguments.overrides)
    return [f"{SEARCH_PATH}=[{quoted(arguments.config_dir)}]", *arguments.overrides]


def shown(arguments: argparse.Namespace) -> str:
    """Returns the configuration as YAML, as ``config.yaml`` of the run would have it."""
    # Only --cfg asks for it; every command imports this module.
    from longctx.launcher.resuming import resume_of
    from longctx.launcher.rundir.resumed_config import configuration

    config = configuration(arguments.overrides, resume_of(arguments) if hasattr(arguments, "resume") else None)
    if arguments.resolve:
        config = resolve(config, _world_size(config, getattr(arguments, "nproc", None)))
    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def _world_size(config: Config, processes: int | None) -> int:
    """Counts the ranks: those that are started, those of the cluster, or the product of the degrees."""
    if processes is not None:
        return processes
    cluster = config.cluster.nodes * config.cluster.devices
    return cluster if cluster > 1 else simulated_world_size(config)
