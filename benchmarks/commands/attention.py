"""``python -m benchmarks attention`` times every strategy on processes of this machine, beside its floor and its peers.

Nothing is timed before a green exactness check: of our strategies on ``sim`` in float64, and of everyone at full size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.attention import LIMIT, measure
from benchmarks.options import add_peer_python, require_longctx
from benchmarks.peers import ATTENTION_PEERS
from longctx.attention import get_strategy
from longctx.bench.timing import Report, silent, spread
from longctx.catalog import STRATEGIES as ALL
from longctx.errors import ConfigError, NumericsError
from longctx.launcher import env
from longctx.launcher.machine import described, load
from longctx.launcher.options import numbers, words
from longctx.launcher.processes import Workers, gloo_rank, run_gloo
from longctx.launcher.progress import labelled, progress, to_file
from longctx.launcher.verify.ranks import check
from longctx.verify import VerifyCase

# "striped" is the ring on striped; "local" takes whole sequences.
STRATEGIES = tuple(name for name in ALL if name not in ("local", "striped"))
LAYOUTS_OF = {"ring": ("contiguous", "zigzag", "striped")}  # of others, the one they prefer
PATIENCE = 3600.0  # seconds
NO_PEERS = "none"
REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="which of ours, comma-separated")
    parser.add_argument("--seq", default="4096,8192", help="tokens, comma-separated: a table for each")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"how often each is timed; default: {REPEATS}")
    parser.add_argument("--world", type=int, default=2, help="processes; more than cores measure the scheduler")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", default="8,2", help="key/value heads, comma-separated: a table for each")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--peers", default=",".join(ATTENTION_PEERS), help=f"which others, or {NO_PEERS}")
    add_peer_python(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats} must be at least 1; {REPEATS} is the default")
    peers = [] if arguments.peers == NO_PEERS else words("peers", arguments.peers, ATTENTION_PEERS)
    require_longctx(arguments.peer_python)
    cells = cells_of(arguments)
    started = time.monotonic()
    with (
        progress("benchmarks attention") as report,
        tempfile.TemporaryDirectory(prefix="longctx-bench-") as name,
    ):
        require_exact(itertools.chain(*cells), report)
        env.set_deepspeed_device()
        job = {"cells": [list(map(asdict, cell)) for cell in cells], "peers": peers, "repeats": arguments.repeats}
        python = arguments.peer_python if peers else sys.executable
        workers = Workers(python, PATIENCE, report=report)
        run_gloo("benchmarks.commands.attention", json.dumps(job), arguments.world, Path(name), workers)
        measured = json.loads((Path(name) / "measured.json").read_text())
    setup = {"repeats": arguments.repeats, "load": load(), "seconds": round(time.monotonic() - started, 1)}
    if arguments.json:
        print(json.dumps({"machine": described(), **setup, "cells": measured}))
    else:
        print(table(arguments, setup, measured))
    return 0


def cells_of(arguments: argparse.Namespace) -> list[list[VerifyCase]]:
    """Lists the cells by key/value heads, then by tokens: every strategy on its layouts."""
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


def require_exact(cases: Iterable[VerifyCase], report: Report = silent) -> None:
    """Refuses to time what is not exact: runs the same cases, shorter and in float64, against the dense reference."""
    small = []
    for case in cases:
        reason = case.refused()
        if reason:
            raise ConfigError(f"{case.strategy} on {case.layout} refuses: {reason}; or leave it out of --strategies")
        small.append(replace(case, backend="sim", seq=min(case.seq, 509), dtype="float64"))
    distinct = list(dict.fromkeys(small))
    for number, case in enumerate(distinct):
        report(number, len(distinct), f"checking {case.strategy} on {case.layout}")
        if not check(case)[0].passed:
            raise NumericsError(f"{case.strategy} on {case.layout} is not exact; it is not timed")


def table(arguments: argparse.Namespace, setup: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"forward + backward, {arguments.world} Gloo processes, causal, float32; {setup['repeats']} interleaved "
        f"repeats, median (min-max); load {setup['load']}, {setup['seconds']:.0f} s; error: relative, of the worst "
        "tensor"
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
        measured, report = [], to_file(folder, rank)
        for cell in job["cells"]:
            cases = [VerifyCase.of(case) for case in cell]
            problem = f"{cases[0].seq} tokens, {cases[0].heads}/{cases[0].kv_heads} heads"
            measured.append(asdict(measure(cases, job["peers"], job["repeats"], labelled(problem, report))))
        if rank == 0:
            (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    worker(sys.argv[1:])
