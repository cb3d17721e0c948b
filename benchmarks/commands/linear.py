"""``python -m benchmarks linear`` measures what linear layers cost over a sequence that ranks share.

First on two processes of one core each: time of a token from short to long sequences, and the share of the floor
without exchanges. Then over four nodes with late links: what each strategy exposes of their latency. Nothing is timed
before a green exactness check of every strategy and mixer on ``sim`` in float64.
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

from benchmarks.commands import late_link as bench_late_link
from benchmarks.linear import FLAT, SHARE, LinearCell, largest_deviation, lengths_of, measure
from longctx.bench.timing import Report, Timing, spread
from longctx.catalog import LINEAR_STRATEGIES, MIXERS
from longctx.errors import ConfigError, NotAvailableError, NumericsError
from longctx.launcher.machine import described, load
from longctx.launcher.options import numbers, words
from longctx.launcher.processes import Workers, gloo_rank, run_gloo
from longctx.launcher.progress import labelled, progress, to_file
from longctx.launcher.verify.ranks import check
from longctx.linear import get_mixer
from longctx.verify import VerifyCase, refusal_of

WORLD, HEADS, HEAD_DIM = 2, 8, 64
GATE_TOKENS = 509
PATIENCE = 3600.0  # seconds
SEQUENCES = "2048,4096,8192,16384,32768"
REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategies", default=",".join(LINEAR_STRATEGIES), help="which, comma-separated")
    parser.add_argument("--seq", default=SEQUENCES, help="tokens, comma-separated")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"how often each is timed; default: {REPEATS}")
    parser.add_argument("--mixers", default="retnet,gated_deltanet", help="comma-separated, of those with a state")
    parser.add_argument(
        "--link", action=argparse.BooleanOptionalAction, default=True, help="whether to go on over late links"
    )
    parser.add_argument("--latency-ms", type=float, default=5.0, help="of a late link, one way")
    parser.add_argument("--latency-tokens", type=int, default=1024, help="of one sequence over the four nodes")


def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats} must be at least 1; {REPEATS} is the default")
    cases = cases_of(arguments)
    late = bench_late_link.cases_of(arguments, cases[0].mixer) if arguments.link else []
    started = time.monotonic()
    with progress("benchmarks linear") as show:
        require_exact(cases, show)
        cells = measured(cases, arguments.repeats, show)
    setup = {"repeats": arguments.repeats, "load": load(), "seconds": round(time.monotonic() - started, 1)}
    if not arguments.json:
        print(report(setup, cells))
    exposed, missing = None, None
    if arguments.link:
        try:
            with progress("benchmarks linear, late links") as show:
                exposed = bench_late_link.measured(late, arguments, show)
        except NotAvailableError as error:
            missing = f"the part over late links was skipped: {error}"
    if arguments.json:
        rows = [{**asdict(cell), "per_token": cell.per_token} for cell in cells]
        uneven = {f"{mixer} {strategy}": largest_deviation(row) for mixer, strategy, row in lengths_of(cells)}
        link = exposed and bench_late_link.as_json(exposed)
        print(json.dumps({"machine": described(), **setup, "cells": rows, "unevenness": uneven, "link": link}))
    elif exposed:
        print("\n" + bench_late_link.report(exposed, arguments))
    if missing:
        raise NotAvailableError(missing)
    return 0


def cases_of(arguments: argparse.Namespace) -> list[VerifyCase]:
    """Lists the cases, mixer x tokens x strategy, contiguous; refuses what a strategy does not execute."""
    stateful = [name for name in MIXERS if get_mixer(name).has_states]
    mixers = words("mixers", arguments.mixers, stateful)
    strategies = words("strategies", arguments.strategies, LINEAR_STRATEGIES)
    lengths = numbers("seq", arguments.seq)
    if min(lengths) < WORLD:
        raise ConfigError(f"--seq {min(lengths)} must be at least {WORLD}: a token for each process")
    return [
        VerifyCase(
            strategy, "contiguous", WORLD, "gloo", seq,
            heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, dtype="float32", mixer=mixer,
        )
        for mixer, seq, strategy in itertools.product(mixers, lengths, strategies)
    ]  # fmt: skip


def require_exact(cases: Iterable[VerifyCase], show: Report) -> None:
    """Refuses to time what is not exact: the same cases, shorter and in float64, against the recurrence."""
    small = []
    for case in cases:
        reason = refusal_of(case)
        if reason:
            raise ConfigError(f"{case.strategy} with {case.mixer} refuses: {reason}; or leave it out")
        small.append(replace(case, backend="sim", seq=min(case.seq, GATE_TOKENS), dtype="float64"))
    distinct = list(dict.fromkeys(small))
    for number, case in enumerate(distinct):
        show(number, len(distinct), f"checking {case.strategy} with {case.mixer}")
        if not check(case)[0].passed:
            raise NumericsError(f"{case.strategy} with {case.mixer} is not exact; it is not timed")


def measured(cases: Sequence[VerifyCase], repeats: int, show: Report) -> list[LinearCell]:
    """Measures mixer after mixer; all lengths and strategies of one take turns."""
    job = {
        "groups": [list(map(asdict, group)) for _, group in itertools.groupby(cases, key=lambda case: case.mixer)],
        "repeats": repeats,
    }
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as name:
        workers = Workers(limit=PATIENCE, report=show)
        run_gloo("benchmarks.commands.linear", json.dumps(job), WORLD, Path(name), workers)
        plain = json.loads((Path(name) / "measured.json").read_text())
    return [
        LinearCell(**{**cell, **{side: Timing(**cell[side]) for side in ("time", "floor", "share")}}) for cell in plain
    ]


def report(setup: dict[str, Any], cells: Sequence[LinearCell]) -> str:
    lines = [
        f"forward + backward of a layer's core, {WORLD} Gloo processes of one core, {HEADS} heads of {HEAD_DIM}, "
        f"float32, contiguous; {setup['repeats']} interleaved repeats, median (min-max); load {setup['load']}, "
        f"{setup['seconds']:.0f} s; time of a token of the whole sequence",
        "",
        "| mixer | strategy | tokens | time, ms | a token, us | floor, ms | share of floor |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for mixer, strategy, row in lengths_of(cells):
        lines += [
            f"| {mixer} | {strategy} | {cell.seq} | {spread(vars(cell.time), 1e3, '.0f')} | {cell.per_token * 1e6:.1f} "
            f"| {spread(vars(cell.floor), 1e3, '.0f')} | {spread(vars(cell.share), 1.0, '.3f')} |"
            for cell in row
        ]
        uneven, least = largest_deviation(row), min(row, key=lambda cell: cell.share.median)
        verdicts.append(
            f"{mixer}, {strategy}: time of a token within {uneven:.1%} of its mean ({_kept(uneven <= FLAT)}: "
            f"{FLAT:.0%}); least share of the floor {least.share.median:.3f} at {least.seq} tokens "
            f"({_kept(least.share.median >= SHARE)}: {SHARE})"
        )
    return "\n".join([*lines, "", *verdicts])


def _kept(kept: bool) -> str:
    return "kept" if kept else "**not kept**"


def worker(given: list[str]) -> None:
    with gloo_rank(given, pinned=True) as (job, folder, rank):
        cells: list[LinearCell] = []
        show = to_file(folder, rank)
        for group in job["groups"]:
            cells += measure([VerifyCase.of(case) for case in group], job["repeats"], labelled(group[0]["mixer"], show))
        if rank == 0:
            (folder / "measured.json").write_text(json.dumps(list(map(asdict, cells))))


if __name__ == "__main__":
    worker(sys.argv[1:])
