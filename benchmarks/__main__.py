"""``python -m benchmarks NAME`` runs one benchmark; each is a module with its own options."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from longctx.launcher import env, streams
from longctx.launcher.cli import EXIT_CODES, exit_code_of

# Name -> what it measures, in a line. Module benchmarks.commands.NAME provides ``add_arguments(parser)`` and
# ``run(arguments) -> exit code``.
BENCHES = {
    "attention": "strategies beside their floors and other packages",
    "trainer": "the trainer beside a bare loop of the same steps",
    "context": "the longest sequence that trains in a fixed memory",
    "link": "flat ring, double ring and USP over a slow link",
    "planning": "planners on rows of long-context documents",
    "linear": "linear layers without exchanges, and over late links",
    "disaggregation": "a skewed batch beside the time of its mean work",
}


def parser_of_all() -> argparse.ArgumentParser:
    """Builds the parser of ``python -m benchmarks``, with one for each benchmark under its ``benches``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measurements of longctx: against bounds, against other packages, over shaped links.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=24, width=100),
        epilog=f"{EXIT_CODES}. How long each takes: benchmarks/README.md",
    )
    benches = parser.add_subparsers(metavar="NAME", required=True)
    for name, purpose in BENCHES.items():
        module = importlib.import_module(f"benchmarks.commands.{name}")
        one = benches.add_parser(name, help=purpose, description=f"Measures {purpose}.", allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.set_defaults(run=module.run)
        module.add_arguments(one)
    parser.set_defaults(benches=benches)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns its exit code."""
    if argv is None:
        streams.protect()
    words = list(sys.argv[1:] if argv is None else argv)
    # Before the benchmarks' modules import torch, which reads both settings then.
    env.share_cores(processes=1)
    return exit_code_of(lambda: _run(words))


def _run(words: list[str]) -> int:
    parser = parser_of_all()
    chosen = parser.get_default("benches").choices.get(words[0]) if words else None
    # Overrides may stand between options, which subparsers by themselves do not take.
    arguments = chosen.parse_intermixed_args(words[1:]) if chosen else parser.parse_args(words)
    status: int = arguments.run(arguments)
    if not status:
        streams.require_written()
    return status


if __name__ == "__main__":
    sys.exit(main())
