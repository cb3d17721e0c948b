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
from typing import NoReturn

import longctx
from longctx.errors import LongctxError
from longctx.launcher import env, streams
from longctx.launcher.failures import CRASH, INTERRUPTED
from longctx.launcher.hydra import flags
from longctx.launcher.stopping import listening
from longctx.rules import redacted, suggestion


@dataclass(frozen=True)
class Command:
    """One row of the table, which says what a subcommand is for and where its code lies. ``name``: one word or two."""

    name: str
    purpose: str
    examples: tuple[str, ...]
    module: str
    overrides: bool = True  # takes Hydra overrides after its own options
    product: bool = True  # what it prints is what it is for; otherwise it only tells of what it does
    requeues: bool = False  # ends with 75 when it is asked to stop: it can be started again


COMMANDS = (
    Command(
        "train",
        "one process of the trainer; under comm=sim the whole world in this process",
        (
            "longctx train train.steps=20",
            "longctx train comm=sim parallel.sp=4 attention=striped",
            "longctx train data=text data.path=corpus/ model=small run.dir=runs/mine",
            "longctx train --resume=runs/mine train.steps=400",
            "torchrun --standalone --nproc-per-node 2 -m longctx.train parallel.sp=2",
        ),
        "longctx.launcher.commands.train",
        product=False,
        requeues=True,
    ),
    Command(
        "launch",
        "start the ranks of this machine",
        (
            "longctx launch --nproc 2 recipe=demo",
            "longctx launch --nproc 4 parallel.sp=2 data.seq_len=8192",
            "longctx launch --nproc 8 comm=nccl train.dtype=bfloat16 train.global_batch=8",
            "longctx launch --nproc 2 --resume=runs/demo train.steps=400",
        ),
        "longctx.launcher.commands.launch",
        product=False,
        requeues=True,
    ),
    Command(
        "submit",
        "render the Slurm job and submit it",
        (
            "longctx submit --dry-run cluster=slurm cluster.nodes=4 comm=nccl parallel.sp=8",
            "longctx submit cluster=slurm cluster.partition=gpu cluster.time_limit=12:00:00 comm=nccl parallel.sp=2",
            "longctx submit cluster=slurm comm=nccl parallel.sp=8 cluster.sbatch.qos=long cluster.sbatch.mem=0",
            "longctx submit --auto-resume cluster=slurm comm=nccl parallel.sp=8 run.dir=runs/long "
            "'cluster.prologue=[module load cuda/12.4,source env/bin/activate]'",
        ),
        "longctx.launcher.commands.submit",
        product=False,
    ),
    Command(
        "verify",
        "exactness of an attention strategy, of a whole run on its mesh, or of a Hugging Face directory",
        (
            "longctx verify --strategy ring --layout zigzag --world 4",
            "longctx verify --strategy striped --world 8 --documents 300,724 --seq 1024 --window 256 --json",
            "longctx verify --backend gloo --world 2 --dtype float32 --dump tensors.safetensors",
            "longctx verify --hf qwen3-0.6b/ comm=sim parallel.sp=2 attention=ring",
            "longctx verify --all",
            "longctx verify --mesh comm=sim parallel.sp=4 parallel.tp=2",
            "longctx verify --mesh --dtype float64 --json recipe=demo",
            "longctx verify --mesh --all --table parity.md",
            "torchrun --nproc-per-node 8 -m longctx.launcher.cli verify --mesh comm=nccl parallel.sp=8",
        ),
        "longctx.launcher.commands.verify",
    ),
    Command(
        "import",
        "the weights of a directory of Hugging Face as step 0 of a run",
        (
            "longctx import --from models/llama run.dir=runs/mine",
            "longctx import --from models/llama run.dir=runs/long model.rope.rope_theta=8e6 data.seq_len=2048",
            "torchrun --nproc-per-node 2 -m longctx.launcher.cli import --from models/llama run.dir=runs/mine",
        ),
        "longctx.launcher.commands.import_",
    ),
    Command(
        "export",
        "a run's weights as a directory that transformers and vLLM read",
        (
            "longctx export --run runs/mine --to exported",
            "longctx export --run runs/mine --step 400 --to exported --dtype bfloat16",
            "longctx export --run runs/mine/checkpoints/step-400 --to exported --shard-size 500mb",
        ),
        "longctx.launcher.commands.export",
        overrides=False,
    ),
    Command(
        "tokenize",
        "turn text into a token file, on all cores; killed, it goes on where it was",
        (
            "longctx tokenize --tokenizer models/mine --in corpus/ --out corpus.bin --eos",
            "longctx tokenize --tokenizer models/mine --in pages.jsonl.gz --out pages.bin --text-key body --workers 8",
            "longctx tokenize --tokenizer bytes --in corpus/ --out corpus.bin --json",
        ),
        "longctx.launcher.commands.tokenize",
        overrides=False,
    ),
    Command(
        "data",
        "an audit of what a run would be trained on",
        (
            "longctx data train.steps=1000 data.seq_len=4096",
            "longctx data --json data=text data.path=docs/ train.steps=20",
        ),
        "longctx.launcher.commands.data",
    ),
    Command(
        "generate",
        "text from a run or a Hugging Face directory, under any mesh",
        (
            "longctx generate --run runs/mine --prompt 'def main(' --max-tokens 64",
            "longctx generate --hf qwen3-0.6b/ --prompt-file question.txt --max-tokens 200 --temperature 0.7",
            "longctx generate --hf qwen3-0.6b/ --prompt-ids 1,2,3 --max-tokens 16 --json comm=sim parallel.sp=4",
            "longctx generate --run runs/mine --prompt-file long.txt --max-tokens 64 comm=nccl parallel.sp=8",
        ),
        "longctx.launcher.commands.generate",
    ),
    Command(
        "bench attention",
        "time the run's attention strategies on its mesh and shapes",
        (
            "longctx bench attention parallel.sp=2 data.seq_len=4096 model=small",
            "longctx bench attention --strategies ring,usp,gather --json parallel.sp=2 attention.layout=zigzag",
            "torchrun --nproc-per-node 8 -m longctx.launcher.cli bench attention comm=nccl parallel.sp=8",
        ),
        "longctx.launcher.commands.bench.attention",
    ),
    Command(
        "bench step",
        "time a step of the run on its mesh, by what it is spent on; writes nothing",
        (
            "longctx bench step recipe=demo",
            "longctx bench step --steps 10 --json parallel.sp=2 attention=gather data.seq_len=4096",
            "srun longctx bench step comm=nccl parallel.sp=8 train.dtype=bfloat16",
        ),
        "longctx.launcher.commands.bench.step",
    ),
)

EXIT_CODES = (
    "exit codes: 0 done, 2 usage, 65 bad data, 69 not available here, 70 numerics or crash, 74 I/O, "
    "75 requeue me, 78 configuration"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if argv is None:
        streams.protect()
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(words, whole_process=argv is None))


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns its exit code; an error of ours is reported in one message."""
    try:
        return _with_help(command)
    except LongctxError as error:
        tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return CRASH


def _with_help(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as leave:  # argparse, after --help or a usage error
        if not leave.code:
            streams.require_written()
        return leave.code if isinstance(leave.code, int) else 2


def tell(error: LongctxError) -> None:
    """Reports an error of ours in one message."""
    print(f"longctx: {redacted(str(error))}", file=sys.stderr)


def _dispatch(words: list[str], whole_process: bool) -> int:
    commands = {command.name: command for command in COMMANDS}
    top = top_parser()
    if not words or words[0].startswith("-"):
        top.parse_args(words)
        return 2
    name = _name_of(words, list(commands), top)
    if name is None:
        top.print_help()
        streams.require_written()
        return 0
    command = commands[name]
    # Before a module of it imports torch, which reads both settings then.
    env.share_cores(processes=1)
    if not command.requeues:
        return _run(command, words)
    with listening(tell, for_good=whole_process):
        return _run(command, words)


def _run(command: Command, words: list[str]) -> int:
    # Only a command needs what it imports; the help of longctx itself comes at once.
    from longctx.launcher.resuming import spelled_out

    module = importlib.import_module(command.module)
    parser = parser_of(command)
    module.add_arguments(parser)
    arguments = _parsed(command, parser, spelled_out(words[len(command.name.split()) :]))
    if getattr(arguments, "cfg", None) is not None:
        print(flags.shown(arguments), end="")
        streams.require_written()
        return 0
    status: int = module.run(arguments)
    if command.product and not status:
        streams.require_written()
    return status


def _parsed(command: Command, parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Reads the options and overrides of one command."""
    if command.overrides:
        flags.refuse_others(command.name, words, parser._option_string_actions)
        if any(word.partition("=")[0] in ("-c", "--cfg") for word in words):
            flags.require_nothing(parser)
    arguments = parser.parse_intermixed_args(words)
    if command.overrides:
        arguments.overrides = flags.with_own_folder(arguments)
    return arguments


def _name_of(words: list[str], commands: list[str], top: argparse.ArgumentParser) -> str | None:
    """The command that the first one or two words name, or None where they ask for help; others end here with 2."""
    first = words[0]
    after = [name.split()[1] for name in commands if name.startswith(f"{first} ")]
    if not after:
        firsts = list(dict.fromkeys(name.split()[0] for name in commands))
        if first not in firsts:
            top.error(f"{first} is not a command; {suggestion(first, firsts)}")
        return first
    second = words[1] if len(words) > 1 else ""
    if second in ("-h", "--help"):
        return None
    if second not in after:
        top.error(f"{first} takes one of its benchmarks first; {suggestion(second, after)}")
    return f"{first} {second}"


class _Parser(argparse.ArgumentParser):
    """Repeats words of the command line without what they hold of logins."""

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


def top_parser() -> argparse.ArgumentParser:
    """Makes the parser of ``longctx`` itself, which knows the commands' names, not their options."""
    table = "\n".join(f"  {command.name:16}{command.purpose}" for command in COMMANDS)
    parser = _Parser(
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
    parser = _Parser(
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
        flags.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
