"""Runs the command line ``longctx``: one table of commands, and errors reported in one message with an exit code.

A command's module provides ``add_arguments(parser)`` for its own options and ``run(arguments) -> exit code``;
a command that composes a configuration also gets ``arguments.overrides``. Modules are imported when their
command is called, so that ``longctx --help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import longctx
from longctx.errors import LongctxError
from longctx.launcher.failures import CRASH, INTERRUPTED
from longctx.rules import suggestion


@dataclass(frozen=True)
class Command:
    """One row of the table, which says what a subcommand is for and where its code lies."""

    name: str
    purpose: str
    examples: tuple[str, ...]
    module: str
    overrides: bool = True  # takes Hydra overrides after its own options


COMMANDS = (
    Command(
        "train",
        "one process of the trainer; under comm=sim the whole world in this process",
        (
            "longctx train train.steps=20",
            "longctx train comm=sim parallel.sp=4 attention=striped",
            "longctx train data=text data.path=corpus/ model=small run.dir=runs/mine",
            "longctx train --resume run.dir=runs/mine data=text data.path=corpus/ model=small",
            "torchrun --standalone --nproc-per-node 2 -m longctx.train parallel.sp=2",
        ),
        "longctx.launcher.commands.train",
    ),
    Command(
        "launch",
        "start torchrun on this machine",
        (
            "longctx launch --nproc 2 recipe=demo",
            "longctx launch --nproc 4 parallel.sp=2 data.seq_len=8192",
            "longctx launch --nproc 8 comm=nccl train.dtype=bfloat16",
            "longctx launch --nproc 2 --resume recipe=demo run.dir=runs/demo",
        ),
        "longctx.launcher.commands.launch",
    ),
    Command(
        "submit",
        "render the Slurm job and submit it",
        (
            "longctx submit --dry-run cluster=slurm cluster.nodes=4 comm=nccl parallel.sp=8",
            "longctx submit cluster=slurm cluster.partition=gpu cluster.time_limit=12:00:00 comm=nccl",
        ),
        "longctx.launcher.commands.submit",
    ),
    Command(
        "verify",
        "exactness of an attention strategy, or of a whole run on its mesh, against the dense reference",
        (
            "longctx verify --strategy ring --layout zigzag --world 4",
            "longctx verify --strategy striped --world 8 --documents 300,724 --seq 1024 --window 256 --json",
            "longctx verify --backend gloo --world 2 --dtype float32 --dump tensors.safetensors",
            "longctx verify --all",
            "longctx verify --mesh comm=sim parallel.sp=4 parallel.tp=2",
            "longctx verify --mesh --dtype float64 --json recipe=demo",
            "longctx verify --mesh --all --table docs/parity.md",
            "torchrun --nproc-per-node 8 -m longctx.launcher.cli verify --mesh comm=nccl parallel.sp=8",
        ),
        "longctx.launcher.commands.verify",
    ),
)

EXIT_CODES = (
    "exit codes: 0 done, 2 usage, 65 bad data, 69 not available here, 70 numerics or crash, 74 I/O, "
    "75 requeue me, 78 configuration"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(words))


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns its exit code; an error of ours is reported in one message."""
    try:
        return command()
    except SystemExit as leave:  # argparse, after --help or a usage error
        return leave.code if isinstance(leave.code, int) else 2
    except LongctxError as error:
        print(f"longctx: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASH


def _dispatch(words: list[str]) -> int:
    commands = {command.name: command for command in COMMANDS}
    top = top_parser()
    if not words or words[0].startswith("-"):
        top.parse_args(words)
        return 2
    if words[0] not in commands:
        top.error(f"{words[0]} is not a command; {suggestion(words[0], list(commands))}")
    command = commands[words[0]]
    module = importlib.import_module(command.module)
    parser = parser_of(command)
    module.add_arguments(parser)
    arguments = parser.parse_intermixed_args(words[1:])
    status: int = module.run(arguments)
    return status


def top_parser() -> argparse.ArgumentParser:
    """Makes the parser of ``longctx`` itself, which knows the commands' names, not their options."""
    table = "\n".join(f"  {command.name:10}{command.purpose}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="longctx",
        description=f"{longctx.__doc__}\n\ncommands:\n{table}",
        epilog=f"`longctx COMMAND --help` shows options and examples.\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"longctx {longctx.__version__}")
    parser.add_argument("command", metavar="COMMAND")
    return parser


def parser_of(command: Command) -> argparse.ArgumentParser:
    """Makes the parser of one command, before its module adds options."""
    examples = "\n".join(f"  {example}" for example in command.examples)
    parser = argparse.ArgumentParser(
        prog=f"longctx {command.name}",
        description=command.purpose[0].upper() + command.purpose[1:] + ".",
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.overrides:
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="what differs from conf/train.yaml, as in Hydra"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
