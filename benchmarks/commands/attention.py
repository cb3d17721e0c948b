"""``python -m benchmarks attention``: every strategy on real processes of this machine, beside its floor and its peers.

Nothing is timed before a green exactness check: of our strategies on ``sim`` in float64, and of everyone at full size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.attention import LIMIT, measure
from benchmarks.peers import ATTENTION_PEERS
from longctx.attention import get_strategy
from longctx.catalog import STRATEGIES as ALL
from longctx.errors import ConfigError, NumericsError
from longctx.launcher import env
from longctx.launcher.machine import described, load
from longctx.launcher.options import numbers, words
from longctx.launcher.processes import Workers, gloo_rank, run_gloo
from longctx.launcher.spread import spread
from longctx.launcher.verify.ranks import check
from longctx.verify import VerifyCase

# "striped" is the ring on striped; "local" takes whole sequences.
STRATEGIES = tuple(name for name in ALL if name not in ("local", "striped"))
LAYOUTS_OF = {"ring": ("contiguous", "zigzag", "striped")}  # of others, the one they prefer
PATIENCE = 3600.0  # seconds
NO_PEERS = "none"
DEFAULTS = {"strategies": ",".join(STRATEGIES), "seq": "4096,8192", "repeats": 3}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--world", type=int, default=2, help="processes; more than cores measure the scheduler")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", default="8,2", help="key/value heads, comma-separated: a table for each")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--peers", default=",".join(ATTENTION_PEERS), help=f"which others, or {NO_PEERS}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats} must be at least 1; 3 is the default")
    peers = [] if arguments.peers == NO_PEERS else words("peers", arguments.peers, ATTENTION_PEERS)
    _check_python(arguments.peer_python)
    cells = cells_of(arguments)
    started = time.monotonic()
    require_exact(itertools.chain(*cells))
    env.set_deepspeed_device()
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as name:
        job = {"cells": [list(map(asdict, cell)) for cell in cells], "peers": peers, "repeats": arguments.repeats}
        python = arguments.peer_python if peers else sys.executable
        workers = Workers(python, PATIENCE)
        run_gloo("benchmarks.commands.attention", json.dumps(job), arguments.world, Path(name), workers)
        measured = json.loads((Path(name) / "measured.json").read_text())
    told = {"repeats": arguments.repeats, "load": load(), "seconds": round(time.monotonic() - started, 1)}
    if arguments.json:
        print(json.dumps({"machine": described(), **told, "cells": measured}))
    else:
        print(report(arguments, told, measured))
    return 0


def _check_python(python: str) -> None:
    """All run in the peers' interpreter, side by side."""
    if python == sys.executable:
        return
    try:
        subprocess.run([python, "-c", "import longctx"], check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            f"--peer-python {python} cannot import longctx; install it there, or set PYTHONPATH"
        ) from None


def cells_of(arguments: argparse.Namespace) -> list[list[VerifyCase]]:
    """By key/value heads, then by tokens: every strategy on its layouts."""
    strategies = words("strategies", arguments.strategies, [name for name in ALL if name != "local"])
    ways = [
        (strategy, layout)
        for strategy in strategies
        for layout in LAYOUTS_OF.get(strategy, (get_strategy(strategy).layout,))
    ]
    return [
        [
            VerifyCase(
                strategy,
                layout,
                arguments.world,
                "gloo",
                seq,
                heads=arguments.heads,
                kv_heads=kv_heads,
                head_dim=arguments.head_dim,
                dtype="float32",
            )
            for strategy, layout in ways
        ]
        for kv_heads, seq in itertools.product(numbers("kv-heads", arguments.kv_heads), numbers("seq", arguments.seq))
    ]


def require_exact(cases: Iterable[VerifyCase]) -> None:
    """No timing without a green gate: the same cases, shorter and in float64, against the dense reference."""
    small = []
    for case in cases:
        reason = case.refused()
        if reason:
            raise ConfigError(f"{case.strategy} on {case.layout} refuses: {reason}; or leave it out of --strategies")
        small.append(replace(case, backend="sim", seq=min(case.seq, 509), dtype="float64"))
    for case in dict.fromkeys(small):
        if not check(case)[0].passed:
            raise NumericsError(f"{case.strategy} on {case.layout} is not exact; it is not timed")


def report(arguments: argparse.Namespace, told: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"forward + backward, {arguments.world} Gloo processes, causal, float32; {told['repeats']} interleaved "
        f"repeats, median (min-max); load {told['load']}, {told['seconds']:.0f} s; error: relative, of the worst tensor"
    ]
    for kv_heads, group in itertools.groupby(cells, key=lambda cell: cell["kv_heads"]):
        of_heads = list(group)
        lines += ["", f"{arguments.heads} query heads of {arguments.head_dim}, {kv_heads} key/value heads", ""]
        lines += [
            "| tokens | who | layout, setting | time, ms | floor, ms | share of floor | error |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(cell["seq"], row) for cell in of_heads for row in cell["rows"]]
        lines += ["", *(_verdict(cell) for cell in of_heads)]
    return "\n".join(lines)


def _line(seq: int, row: dict[str, Any]) -> str:
    if row["refused"]:
        return f"| {seq} | {row['who']} | {row['refused']} | | | | |"
    columns = [spread(row["time"], 1e3, ".0f"), "", ""]
    if row["floor"]:
        columns[1:] = [spread(row["floor"], 1e3, ".0f"), spread(row["share_of_floor"], 1.0, ".3f")]
    return f"| {seq} | {row['who']} | {row['setting']} | {' | '.join(columns)} | {_error(row['errors'])} |"


def _error(errors: dict[str, float]) -> str:
    worst = max(errors, key=lambda name: errors[name])
    said = f"{errors[worst]:.1e} ({worst})"
    return said if errors[worst] <= LIMIT else f"**wrong**: {said}"


def _verdict(cell: dict[str, Any]) -> str:
    if not cell["ahead"]:
        return f"{cell['seq']} tokens: no exact peer was timed"
    ahead = spread(cell["ahead"], 1.0, ".3f")
    return f"{cell['seq']} tokens: the best peer, {cell['best_peer']}, takes {ahead} times as long as {cell['best']}"


def worker(given: list[str]) -> None:
    with gloo_rank(given, pinned=True) as (job, folder, rank):
        measured = []
        for cell in job["cells"]:
            cases = [VerifyCase.of(case) for case in cell]
            measured.append(asdict(measure(cases, job["peers"], job["repeats"])))
        if rank == 0:
            (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    worker(sys.argv[1:])
