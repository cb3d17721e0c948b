"""``python -m benchmarks planning`` compares planners on rows of long-context documents, and what they gain on a clock.

No processes and no devices: plans are counted, and the event simulator's seconds are a model's, not a measurement's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.commands import balance as bench_balance
from benchmarks.distca import distca
from longctx.errors import ConfigError
from longctx.launcher.machine import described
from longctx.launcher.progress import progress, with_progress
from longctx.planner import (
    DocumentPlacement,
    MaskSlices,
    Plan,
    PlannerOptions,
    TaskRuns,
    Tasks,
    Topology,
    causal,
    make_plan,
    streamed,
)
from longctx.planner.lengths import draw_rows, long_mixture, read_lengths, stream_rows, synthetic
from longctx.planner.pipelines import ClusterRun, disaggregated, fixed_packing, wlb
from longctx.planner.planners.cad import least_egress

TOKENS = 32768  # of each server
LIMIT = 1.02  # of the mean work: what the least egress is counted for
BATCHES = 6
SERVERS, DRAWS, TIMED = "8,64,256,512", 3, 9
# What a way to measure has no use for.
UNUSED = {"clock": ("balance", "servers", "draws", "timed"), "balance": ("timed",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", default="", help="JSON list of document lengths; without it synthetic ones")
    parser.add_argument("--contexts", default="131072,524288", help="tokens of a row, comma-separated")
    parser.add_argument("--servers", help=f"servers, comma-separated; 32,768 tokens each; default: {SERVERS}")
    parser.add_argument("--draws", type=int, help=f"seeded draws of documents for each size; default: {DRAWS}")
    parser.add_argument(
        "--timed", type=int, help=f"plans made for the median time, after one to warm up; default: {TIMED}"
    )
    parser.add_argument("--clock", action="store_true", help="replay training steps on the event simulator instead")
    parser.add_argument(
        "--balance",
        default="",
        metavar="ROWS",
        help="measure data.balance instead, with so many rows a rank and step, comma-separated; servers are its ranks",
    )


@dataclass(frozen=True)
class PlannerRow:
    """Tells what one planner made of one draw of documents.

    ``gigabytes``: Q, O and KV moved forward for a layer of an 8B model, bf16; Q and O are equal. ``worst_gigabytes``:
    through one rank's busier direction.

    Egress is the worst rank's query rows, told as two ratios. One is over the mean of all ranks. The other is over the
    least that the worst rank of this home layout must send for 1.02 of the mean work.

    ``milliseconds``: home layout, tasks, transfers and cost, median; the processor's as well, since a wall clock counts
    other processes too.
    """

    context: int
    servers: int
    draw: int
    planner: str
    imbalance: float
    gigabytes: float
    kv_gigabytes: float
    egress_over_mean: float
    egress_over_least: float
    worst_gigabytes: float
    milliseconds: float
    cpu_milliseconds: float


def run(arguments: argparse.Namespace) -> int:
    _require_used(arguments)
    draws = DRAWS if arguments.draws is None else arguments.draws
    timed = TIMED if arguments.timed is None else arguments.timed
    contexts, servers = _numbers("contexts", arguments.contexts), _numbers("servers", arguments.servers or SERVERS)
    if draws < 1 or timed < 1:
        raise ConfigError(f"--draws {draws} and --timed {timed} must be at least 1")
    lengths = read_lengths(arguments.lengths) if arguments.lengths else synthetic(0)
    with progress("benchmarks planning") as report:
        if arguments.clock:
            found = [clock(lengths, context) for context in with_progress(contexts, report)]
            lines = [_clock_header(), *map(_clock_line, found)]
            rows: list[dict[str, object]] = [dict(one) for one in found]
        elif arguments.balance:
            sizes = list(itertools.product(contexts, servers, _numbers("balance", arguments.balance)))
            ways = [
                way for size in with_progress(sizes, report) for way in bench_balance.balanced(lengths, *size, draws)
            ]
            lines, rows = [bench_balance.header(), *map(bench_balance.line, ways)], [asdict(way) for way in ways]
        else:
            cells = [cell for cell in itertools.product(contexts, servers, range(draws)) if cell[1] * TOKENS >= cell[0]]
            planned = [row for cell in with_progress(cells, report) for row in planners(lengths, *cell, timed)]
            lines, rows = [_header(), *map(_line, planned)], [asdict(row) for row in planned]
    if arguments.json:
        print(json.dumps({"machine": described(), "lengths": arguments.lengths or "synthetic", "rows": rows}))
    else:
        print("\n".join(lines))
    return 0


def _require_used(arguments: argparse.Namespace) -> None:
    for way, names in UNUSED.items():
        for name in names if getattr(arguments, way) else ():
            if (given := getattr(arguments, name)) not in (None, ""):
                raise ConfigError(f"--{name} {given} does nothing with --{way}; leave one of them out")


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--{name} {text!r} must be whole numbers above 0 with commas between")
    return numbers


def planners(lengths: np.ndarray, context: int, servers: int, draw: int, timed: int) -> list[PlannerRow]:
    """Measures DistCA's greedy planner at both of its tolerances, and ``cad``, on equal documents and home layouts."""
    documents = np.concatenate(draw_rows(lengths, context, servers * TOKENS // context, np.random.default_rng(draw)))
    mask, options = causal(documents), PlannerOptions()
    ways: dict[str, Callable[[DocumentPlacement], Plan]] = {
        "distca 0.1": lambda home: _of_runs(distca(home, 0.1), home, mask),
        "distca 0.02": lambda home: _of_runs(distca(home, 0.02), home, mask),
        "cad": lambda home: make_plan("cad", mask, Topology(servers), options, home),
    }
    rows = []
    for name, make in ways.items():
        seconds = []
        for _ in range(1 + timed):
            start, cpu = time.perf_counter(), time.process_time()
            made = make(streamed(documents, servers))
            cost = made.cost
            seconds.append((time.perf_counter() - start, time.process_time() - cpu))
        least = int(least_egress(made.home, mask, int(cost.work.sum() * LIMIT / servers)).max())
        worst = int(cost.q_sent.max())
        busiest = float(np.maximum(cost.sent, cost.received).max()) / 1e9
        rows.append(
            PlannerRow(
                context, servers, draw, name, cost.imbalance, cost.moved / 1e9, cost.kv / 1e9,
                worst / max(1e-9, float(cost.q_sent.mean())), worst / max(1, least), busiest,
                *(statistics.median(column) * 1e3 for column in zip(*seconds[1:], strict=True)),
            )
        )  # fmt: skip
    return rows


def _of_runs(runs: TaskRuns, home: DocumentPlacement, mask: MaskSlices) -> Plan:
    return Plan("distca", home, mask, Tasks.of_runs(mask, runs), PlannerOptions().widths)


def clock(lengths: np.ndarray, context: int) -> dict[str, float]:
    """Returns mean seconds of steps over ``BATCHES`` batches, as ratios to CAD's, with both ablations."""
    run, seconds, shares = ClusterRun(), [], []
    for seed in range(BATCHES):
        mixture = long_mixture(lengths, context, np.random.default_rng(seed))
        rows = stream_rows(mixture, context, run.replicas * run.microbatches)
        step, lazy = disaggregated(run, rows), disaggregated(run, rows, idle_serve=False)
        shares.append(max(step.communication))
        seconds.append(
            (step.seconds, fixed_packing(run, rows), wlb(run, rows), wlb(run, rows, hidden=True), lazy.seconds)
        )
    cad, fixed, packed, hidden, lazy_cad = (statistics.mean(column) for column in zip(*seconds, strict=True))
    return {
        "context": context,
        "fixed_over_cad": fixed / cad,
        "wlb_over_cad": packed / cad,
        "wlb_over_cad_gather_hidden": hidden / cad,
        "wlb_over_cad_idle_not_serving": packed / lazy_cad,
        "busiest_exchange_over_window": max(shares),
    }


def _header() -> str:
    return (
        f"{'context':>8} {'servers':>7} {'draw':>4} {'planner':<12} {'max/mean':>8} {'moved GB':>8} {'KV GB':>7} "
        f"{'q egress/mean':>13} {'/least':>6} {'worst rank GB':>13} {'ms':>7} {'CPU ms':>7}"
    )


def _line(row: PlannerRow) -> str:
    return (
        f"{row.context:>8} {row.servers:>7} {row.draw:>4} {row.planner:<12} {row.imbalance:>8.3f} "
        f"{row.gigabytes:>8.2f} {row.kv_gigabytes:>7.2f} {row.egress_over_mean:>13.1f} {row.egress_over_least:>6.2f} "
        f"{row.worst_gigabytes:>13.2f} {row.milliseconds:>7.1f} {row.cpu_milliseconds:>7.1f}"
    )


def _clock_header() -> str:
    names: Sequence[str] = ("context", "fixed/CAD", "WLB/CAD", "gather hidden", "idle not serving", "exchange/window")
    return " ".join(f"{name:>16}" for name in names)


def _clock_line(found: dict[str, float]) -> str:
    return " ".join(f"{value:>16.2f}" if name != "context" else f"{value:>16}" for name, value in found.items())
