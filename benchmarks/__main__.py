"""``python -m benchmarks NAME``: one benchmark per module, each with its own options."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from longctx.errors import ConfigError
from longctx.launcher.cli import exit_code_of

# Each module provides ``add_arguments(group)`` and ``run(arguments) -> exit code``.
BENCHES = {
    "attention": "benchmarks.commands.attention",
    "trainer": "benchmarks.commands.trainer",
    "context": "benchmarks.commands.context",
    "link": "benchmarks.commands.link",
    "planning": "benchmarks.commands.planning",
    "linear": "benchmarks.commands.linear",
    "disaggregation": "benchmarks.commands.disaggregation",
}
# Options of several benchmarks, whose modules say what they are when left out (``DEFAULTS``) -> type and help.
SHARED: dict[str, tuple[type, str]] = {
    "strategies": (str, "which of ours, comma-separated"),
    "seq": (str, "tokens, comma-separated"),
    "repeats": (int, "how often each is timed"),
}
SHARE_OPTIONS = ("attention", "linear")
TAKE_OVERRIDES = ("trainer", "context")
HAVE_PEERS = ("attention", "context")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bench", nargs="?", default="attention", help=f"one of {', '.join(BENCHES)}")
    takers = ", ".join(TAKE_OVERRIDES)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"what differs from conf/train.yaml, for {takers}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help=f"interpreter in which the peers are installed, for {', '.join(HAVE_PEERS)}",
    )
    shared = parser.add_argument_group(f"bench {' and '.join(SHARE_OPTIONS)}")
    for option, (kind, purpose) in SHARED.items():
        defaults = ", ".join(f"{_module(name).DEFAULTS[option]} ({name})" for name in SHARE_OPTIONS)
        shared.add_argument(f"--{option}", type=kind, help=f"{purpose}; default: {defaults}")
    for name in BENCHES:
        _module(name).add_arguments(parser.add_argument_group(f"bench {name}"))


def run(arguments: argparse.Namespace) -> int:
    name = arguments.bench
    if name not in BENCHES:
        raise ConfigError(f"bench {name!r} is unknown; valid: {', '.join(BENCHES)}")
    if arguments.overrides and name not in TAKE_OVERRIDES:
        raise ConfigError(f"bench {name} takes no overrides, got {arguments.overrides[0]!r}")
    if arguments.peer_python != sys.executable and name not in HAVE_PEERS:
        raise ConfigError(f"--peer-python belongs to bench {' and '.join(HAVE_PEERS)}, not to {name}")
    _refuse_options_of_others(arguments)
    _fill_shared(arguments)
    status: int = _module(name).run(arguments)
    return status


def _refuse_options_of_others(arguments: argparse.Namespace) -> None:
    for name in BENCHES:
        parser = argparse.ArgumentParser(add_help=False)
        _module(name).add_arguments(parser.add_argument_group())
        for option, default in vars(parser.parse_args([])).items():
            if name != arguments.bench and getattr(arguments, option) != default:
                raise ConfigError(f"--{option.replace('_', '-')} belongs to bench {name}, not to {arguments.bench}")


def _fill_shared(arguments: argparse.Namespace) -> None:
    """What the benchmark says of options that were left out; refuses them where it does not read them."""
    name = arguments.bench
    for option in SHARED:
        if name in SHARE_OPTIONS:
            if getattr(arguments, option) is None:
                setattr(arguments, option, _module(name).DEFAULTS[option])
        elif getattr(arguments, option) is not None:
            raise ConfigError(f"--{option} belongs to bench {' and '.join(SHARE_OPTIONS)}, not to {name}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(BENCHES[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return exit_code_of(lambda: run(parser.parse_intermixed_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
