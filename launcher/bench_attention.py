"""``longctx bench attention``: each layout on real processes of this machine, behind a green exactness check."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from longctx.bench.attention import measure
from longctx.errors import ConfigError, NumericsError
from longctx.launcher.machine import described
from longctx.launcher.processes import join_gloo, run_gloo
from longctx.launcher.verify_command import check
from longctx.verify import VerifyCase

LAYOUTS_TIMED = ("contiguous", "zigzag", "striped")


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--world", type=int, default=2, help="processes; more than cores measure the scheduler")
    parser.add_argument("--seq", default="4096,8192", help="tokens, comma-separated")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)


def run(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats} must be at least 1; 7 is the default")
    cases = cases_of(arguments)
    require_exact(cases)
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as name:
        job = json.dumps({"cases": [asdict(case) for case in cases], "repeats": arguments.repeats})
        run_gloo("longctx.launcher.bench_attention", job, arguments.world, Path(name))
        rows = json.loads((Path(name) / "measured.json").read_text())
    if arguments.json:
        print(json.dumps({"machine": described(), "repeats": arguments.repeats, "rows": rows}))
    else:
        print(table(arguments, rows))
    return 0


def cases_of(arguments: argparse.Namespace) -> list[VerifyCase]:
    try:
        lengths = [int(length) for length in arguments.seq.split(",")]
    except ValueError:
        raise ConfigError(f"--seq {arguments.seq!r} must be whole numbers with commas between") from None
    return [
        VerifyCase(
            "ring",
            layout,
            arguments.world,
            "gloo",
            seq,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            head_dim=arguments.head_dim,
            dtype="float32",
        )
        for seq, layout in itertools.product(lengths, LAYOUTS_TIMED)
    ]


def require_exact(cases: list[VerifyCase]) -> None:
    """No timing without a green gate: the same cases, shorter and in float64, against the dense reference."""
    for case in cases:
        reason = case.refused()
        if reason:
            raise ConfigError(f"{case.strategy} on {case.layout} refuses: {reason}")
        small = replace(case, backend="sim", seq=min(case.seq, 509), dtype="float64")
        if not check(small)[0].passed:
            raise NumericsError(f"{case.strategy} on {case.layout} is not exact; it is not timed")


def table(arguments: argparse.Namespace, rows: list[dict[str, dict[str, float]]]) -> str:
    lines = [
        f"forward + backward, {arguments.world} Gloo processes, {arguments.heads}/{arguments.kv_heads} heads of "
        f"{arguments.head_dim}, causal, float32, {arguments.repeats} interleaved repeats; median (min-max)",
        "",
        "| tokens | layout | time, ms | floor, ms | share of floor |",
        "|---|---|---|---|---|",
    ]
    for case, row in zip(cases_of(arguments), rows, strict=True):
        milliseconds = (_spread(row[name], 1e3, ".0f") for name in ("strategy", "floor"))
        share = _spread(row["share_of_floor"], 1.0, ".3f")
        lines.append(f"| {case.seq} | {case.layout} | {' | '.join(milliseconds)} | {share} |")
    return "\n".join(lines)


def _spread(timing: dict[str, float], scale: float, form: str) -> str:
    low, median, high = (format(timing[name] * scale, form) for name in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def worker(words: list[str]) -> None:
    """One rank: the job as JSON, folder, rank, world."""
    job, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= world:
        os.sched_setaffinity(0, {cores[rank]})
    join_gloo(folder, rank, world)
    cases = [VerifyCase(**{**case, "documents": tuple(case["documents"])}) for case in job["cases"]]
    rows = [asdict(measured) for measured in measure(cases, job["repeats"])]
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1:])
