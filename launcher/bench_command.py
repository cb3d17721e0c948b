"""``longctx bench``: one benchmark per module, each with its own options."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from longctx.errors import ConfigError, NotAvailableError

# Each module provides ``add_arguments(group)`` and ``run(arguments) -> exit code``.
BENCHES = {
    "attention": "longctx.launcher.bench_attention",
    "trainer": "longctx.launcher.bench_trainer",
    "context": "longctx.launcher.bench_context",
    "link": "longctx.launcher.bench_link",
}
BENCHES_PLANNED = ("linear", "memory", "disaggregation")
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
    for name in BENCHES:
        _module(name).add_arguments(parser.add_argument_group(f"bench {name}"))


def run(arguments: argparse.Namespace) -> int:
    name = arguments.bench
    if name in BENCHES_PLANNED:
        raise NotAvailableError(f"bench {name} is not built yet; available: {', '.join(BENCHES)}")
    if name not in BENCHES:
        raise ConfigError(f"bench {name!r} is unknown; valid: {', '.join(BENCHES)}")
    if arguments.overrides and name not in TAKE_OVERRIDES:
        raise ConfigError(f"bench {name} takes no overrides, got {arguments.overrides[0]!r}")
    if arguments.peer_python != sys.executable and name not in HAVE_PEERS:
        raise ConfigError(f"--peer-python belongs to bench {' and '.join(HAVE_PEERS)}, not to {name}")
    _refuse_options_of_others(arguments)
    status: int = _module(name).run(arguments)
    return status


def _refuse_options_of_others(arguments: argparse.Namespace) -> None:
    for name in BENCHES:
        parser = argparse.ArgumentParser(add_help=False)
        _module(name).add_arguments(parser.add_argument_group())
        for option, default in vars(parser.parse_args([])).items():
            if name != arguments.bench and getattr(arguments, option) != default:
                raise ConfigError(f"--{option.replace('_', '-')} belongs to bench {name}, not to {arguments.bench}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(BENCHES[name])
