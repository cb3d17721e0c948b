"""``python -m benchmarks disaggregation`` times a skewed batch on real processes, beside the time of the mean work.

Nothing is timed before every way is exact. The batch, scaled down, is compared with dense attention on ``sim`` in
float64. At full size in float32 it is compared with plain data parallelism, which shares nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.disaggregation import WAYS, Problem, attend, measure, skewed
from longctx.attention import dense_attention
from longctx.bench.timing import spread
from longctx.errors import ConfigError, NumericsError
from longctx.launcher.machine import described, load
from longctx.launcher.options import numbers, words
from longctx.launcher.processes import Workers, gloo_rank, run_gloo
from longctx.launcher.progress import progress, to_file
from longctx.sequence import Mask, unshard
from longctx.sim import Cluster
from longctx.verify.case import TOLERANCE

PATIENCE = 3600.0  # seconds
GATE_TOKENS = 512
REQUIRED = 1.10  # of the mean work's time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="more than cores measure the scheduler")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="of all processes together, shared equally")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the one long document")
    parser.add_argument("--short", default="64,2048", help="least and most tokens of the others")
    parser.add_argument("--layer", default="8,2,64", help="query heads, key/value heads, width of a head")
    parser.add_argument("--ways", default=",".join(WAYS), help="which, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")


def run(arguments: argparse.Namespace) -> int:
    problem, ways = problem_of(arguments), words("ways", arguments.ways, WAYS)
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds {arguments.rounds} must be at least 1; 5 is the default")
    started = time.monotonic()
    job = {"problem": asdict(problem), "ways": ways, "rounds": arguments.rounds}
    with (
        progress("benchmarks disaggregation") as show,
        tempfile.TemporaryDirectory(prefix="longctx-bench-") as name,
    ):
        show(0, 0, "checking every way")
        require_exact(problem, ways)
        workers = Workers(limit=PATIENCE, report=show)
        run_gloo("benchmarks.commands.disaggregation", json.dumps(job), problem.world, Path(name), workers)
        measured = json.loads((Path(name) / "measured.json").read_text())
    setup = {"rounds": arguments.rounds, "load": load(), "seconds": round(time.monotonic() - started, 1)}
    if arguments.json:
        print(json.dumps({"machine": described(), **setup, "problem": asdict(problem), **measured}))
    else:
        print(report(problem, setup, measured))
    return 0


def problem_of(arguments: argparse.Namespace) -> Problem:
    world, tokens, longest = arguments.processes, arguments.batch_tokens, arguments.longest
    if world < 1:
        raise ConfigError(f"--processes {world} must be at least 1; 2 is the default")
    if tokens < world or tokens % world:
        nearest = max(1, tokens // world) * world
        raise ConfigError(f"--batch-tokens {tokens} must divide by --processes {world}; nearest valid: {nearest}")
    if not 1 <= longest <= tokens // world:
        raise ConfigError(
            f"--longest {longest} must be 1 to {tokens // world}, what a process holds of --batch-tokens {tokens}"
        )
    short, layer = numbers("short", arguments.short), numbers("layer", arguments.layer)
    if len(short) != 2 or not 1 <= short[0] <= short[1]:
        raise ConfigError(f"--short {arguments.short} must be two lengths from 1, ascending, such as 64,2048")
    if len(layer) != 3 or min(layer) < 1 or layer[0] % layer[1] or layer[2] % 2:
        raise ConfigError(
            f"--layer {arguments.layer} must be query heads, key/value heads that divide them, and an even width of a "
            "head, such as 8,2,64"
        )
    heads, kv_heads, head_dim = layer
    return Problem(skewed(world, tokens, longest, (short[0], short[1]), 0), heads, kv_heads, head_dim)


def require_exact(problem: Problem, ways: list[str]) -> None:
    """Refuses to time what is not exact: the same skew, shorter and in float64, against the dense reference."""
    longest, budget = problem.shares[0][0], sum(problem.shares[0])
    small = min(budget, GATE_TOKENS)
    shares = skewed(problem.world, small * problem.world, max(1, longest * small // budget), (1, max(1, small // 8)), 1)
    short = replace(problem, shares=shares, dtype="float64")
    q, k, v, dout = short.tensors
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = dense_attention(leaves[0], leaves[1], leaves[2], (short.documents,), Mask(True, None))
    truth = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for name in ways:
        way = WAYS[name]
        ranks = Cluster(short.world, trace=False).run(attend, short, way)
        plan = short.plan(way.layout(short))
        for parts, true in zip(zip(*ranks, strict=True), truth, strict=True):
            error = float((unshard(list(parts), plan) - true).norm() / (true.norm() + 1e-3 * dout.norm()))
            if not error <= TOLERANCE["float64"][0]:
                raise NumericsError(f"{way.title} is off by {error:.1e} in float64; it is not timed")


def report(problem: Problem, setup: dict[str, Any], measured: dict[str, Any]) -> str:
    lengths = sorted(problem.documents.lengths.tolist())
    lines = [
        f"one layer, forward + backward, {problem.world} Gloo processes, causal, float32, {problem.heads} query heads "
        f"of {problem.head_dim}, {problem.kv_heads} key/value heads; {problem.documents.length} tokens in documents of "
        f"{', '.join(map(str, lengths[:-4:-1]))} and {max(0, len(lengths) - 3)} shorter ones; "
        f"{setup['rounds']} interleaved rounds, median (min-max); load {setup['load']}, {setup['seconds']:.0f} s; "
        f"linear parts {spread(measured['linear'], 1e3, '.0f')} ms",
        "",
        "| way | cells of a rank over mean | MB sent by rank | attention, ms | its mean work, ms | over it "
        "| block, ms | over its mean work | error |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_line, measured["rows"]),
    ]
    return "\n".join([*lines, "", *map(_verdict, measured["rows"])])


def _line(row: dict[str, Any]) -> str:
    mean = sum(row["cells"]) / len(row["cells"])
    shares = ", ".join(f"{cells / mean:.3f}" for cells in row["cells"])
    sent = ", ".join(f"{count / 1e6:.1f}" for count in row["bytes"])
    return (
        f"| {row['way']} | {shares} | {sent} | {spread(row['attention'], 1e3, '.0f')} "
        f"| {spread(row['work'], 1e3, '.0f')} | {spread(row['over_attention'], 1.0, '.3f')} "
        f"| {spread(row['block'], 1e3, '.0f')} | {spread(row['over_block'], 1.0, '.3f')} | {row['error']:.1e} |"
    )


def _verdict(row: dict[str, Any]) -> str:
    steps = []
    for what in ("attention", "block"):
        over = row[f"over_{what}"]["median"]
        steps.append(f"{what} {over:.3f} ({'kept' if over <= REQUIRED else 'not kept'})")
    return f"{row['way']}, within {REQUIRED:.2f} of the mean work's time: {', '.join(steps)}"


def worker(given: list[str]) -> None:
    with gloo_rank(given, pinned=True) as (job, folder, rank):
        shares = tuple(map(tuple, job["problem"]["shares"]))
        measured = measure(
            Problem(**{**job["problem"], "shares": shares}), job["ways"], job["rounds"], to_file(folder, rank)
        )
        if rank == 0:
            (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    worker(sys.argv[1:])
