"""``python -m benchmarks link`` times flat ring, double ring and USP over two nodes with a slow link between them.

Nodes are network namespaces of this machine with two ranks each. Three things must hold:
- Bytes on the link are what the strategies' closed forms say.
- Exchange-only time is what these bytes take at the link's rate, in the order in which they need each other.
- The three strategies are ranked as these times are.

Before that every strategy computes over the same link, and is compared with the dense reference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from benchmarks.commands.attention import require_exact
from benchmarks.dependence import chained_seconds
from benchmarks.hosts.namespaces import Namespaces, link_counters
from benchmarks.link import (
    LATE,
    PASSES,
    UNEXPLAINED,
    LinkTraffic,
    PassRow,
    PassTraffic,
    as_predicted,
    judged,
    measure,
    silent_kernel,
)
from longctx.errors import ConfigError, NumericsError
from longctx.launcher.machine import described, load
from longctx.launcher.processes import Workers, gloo_rank, run_gloo, unwind_on_stop
from longctx.launcher.progress import progress, to_file
from longctx.launcher.verify.ranks import load_result, save_result
from longctx.options import DEFAULT, StrategyOptions
from longctx.sim import Cluster, mark_step
from longctx.verify import VerifyCase, judge, run_rank

NODES, RANKS = 2, 4
ROUTES = {
    "flat ring": ("ring", DEFAULT),
    "double ring": ("burst", StrategyOptions(inner_ring=RANKS // NODES)),
    "USP": ("usp", StrategyOptions(ulysses_degree=RANKS // NODES)),
}
GATE_TOKENS = 509


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate-mbit", type=int, default=200, help="of the link between the nodes, each way")
    parser.add_argument("--link-tokens", type=int, default=8192, help="of one sequence over the four ranks")
    parser.add_argument("--link-heads", default="8/8", help="query heads / key and value heads, of 64 in fp32")
    parser.add_argument("--link-causal", action="store_true", help="default: every query sees every key")
    parser.add_argument("--link-repeats", type=int, default=5)


def run(arguments: argparse.Namespace) -> int:
    cases = cases_of(arguments)
    with (
        unwind_on_stop(),
        Namespaces(NODES, arguments.rate_mbit) as nodes,
        progress("benchmarks link") as report,
        tempfile.TemporaryDirectory(prefix="longctx-bench-") as name,
    ):
        require_exact(cases, report)
        job = json.dumps({"cases": [asdict(case) for case in cases], "repeats": arguments.link_repeats})
        prefixes = [nodes.prefix(rank // (RANKS // NODES)) for rank in range(RANKS)]
        run_gloo(
            "benchmarks.commands.link",
            job,
            RANKS,
            Path(name),
            Workers(prefixes=prefixes, report=report),
        )
        errors = require_exact_here(cases, Path(name))
        seen = [json.loads((Path(name) / f"measured-{rank}.json").read_text()) for rank in range(RANKS)]
    by_rank = [[[[_pass_traffic(one) for one in both] for both in repeats] for repeats in cases] for cases in seen]
    rows = [
        judged(
            case, NODES, arguments.rate_mbit, [rank[number] for rank in by_rank], predicted(case, arguments.rate_mbit)
        )
        for number, case in enumerate(cases)
    ]
    if arguments.json:
        print(json.dumps(as_json(arguments, rows, errors)))
    else:
        print(table(arguments, rows))
    complaints = wrong_bytes(rows)
    if complaints:
        raise NumericsError("; ".join(complaints))
    return 0


def cases_of(arguments: argparse.Namespace) -> list[VerifyCase]:
    """Returns one case for each route of keys and values; they differ in nothing else."""
    for name, least in (("rate_mbit", 1), ("link_tokens", RANKS), ("link_repeats", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least {least}")
    try:
        heads, kv_heads = (int(word) for word in arguments.link_heads.split("/"))
    except ValueError:
        raise ConfigError(f"--link-heads {arguments.link_heads!r} must be two numbers such as 8/2") from None
    return [
        VerifyCase(
            strategy,
            "zigzag",
            RANKS,
            "gloo",
            arguments.link_tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=64,
            dtype="float32",
            causal=arguments.link_causal,
            options=options,
        )
        for strategy, options in ROUTES.values()
    ]


def predicted(case: VerifyCase, rate_mbit: int) -> list[float]:
    """Predicts the seconds of each pass at the links' rate, from the messages of the same exchange on ``sim``."""
    cluster = Cluster(case.world)

    def exchange() -> None:
        both = LinkTraffic(case)
        for number, run in enumerate((both.forward, both.backward)):
            mark_step(1 + number)
            run()

    with silent_kernel():
        cluster.run(exchange)
    steps = [
        [[event for event in trace if event.step == 1 + number] for trace in cluster.trace]
        for number in range(len(PASSES))
    ]
    return [chained_seconds(traces, case.world // NODES, rate_mbit * 1e6 / 8) for traces in steps]


def gate_of(case: VerifyCase) -> VerifyCase:
    """Returns the case shorter and in float64: what the ranks compute over the link before they are timed."""
    return replace(case, seq=min(case.seq, GATE_TOKENS), dtype="float64")


def compute_here(cases: Sequence[VerifyCase], folder: Path, rank: int) -> None:
    """Computes the gate's cases on this rank, before anything is timed."""
    for number, case in enumerate(cases):
        save_result(run_rank(gate_of(case), dist.group.WORLD), folder / f"computed-{number}-{rank}.safetensors")


def require_exact_here(cases: Sequence[VerifyCase], folder: Path) -> list[dict[str, float]]:
    """Refuses what ``compute_here`` computed inexactly; returns its errors."""
    errors = []
    for number, case in enumerate(cases):
        ranks = [load_result(folder / f"computed-{number}-{rank}.safetensors") for rank in range(case.world)]
        verdict, _ = judge(gate_of(case), ranks)
        if not verdict.passed:
            raise NumericsError(f"{case.strategy} is not exact over the link: {verdict.errors}; its times are not told")
        errors.append(verdict.errors)
    return errors


def _pass_traffic(one: dict[str, object]) -> PassTraffic:
    sent = one["sent"]
    assert isinstance(sent, dict)
    return PassTraffic(**{**one, "sent": {int(receiver): size for receiver, size in sent.items()}})  # type: ignore[arg-type]


def wrong_bytes(rows: list[list[PassRow]]) -> list[str]:
    """Lists where other bytes crossed than the closed forms say."""
    found = []
    for route, passes in zip(ROUTES, rows, strict=True):
        for row in passes:
            rest = max((node.unexplained for node in row.nodes), key=abs)
            if not row.edges_equal:
                found.append(f"{route}, {row.name}: ranks counted other bytes between nodes than the closed form")
            if abs(rest) > UNEXPLAINED:
                found.append(f"{route}, {row.name}: the link carried {rest:+.2%} beside the closed form and headers")
    return found


def late(rows: list[list[PassRow]]) -> list[str]:
    """Lists passes that took longer than their messages at the links' rate plus what the method allows."""
    return [
        f"{route} {row.name} {row.ratio:.2f}"
        for route, passes in zip(ROUTES, rows, strict=True)
        for row in passes
        if row.ratio > LATE
    ]


def in_order(rows: list[list[PassRow]]) -> bool:
    """Tells whether both passes together rank the routes as they were predicted."""
    times = [sum(row.predicted for row in passes) for passes in rows]
    return as_predicted(times, [sum(row.seconds.median for row in passes) for passes in rows])


def as_json(
    arguments: argparse.Namespace, rows: list[list[PassRow]], errors: list[dict[str, float]]
) -> dict[str, object]:
    return {
        "machine": described(),
        "load": load(),
        "rate_mbit": arguments.rate_mbit,
        "repeats": arguments.link_repeats,
        "errors": dict(zip(ROUTES, errors, strict=True)),
        "rows": {
            route: [{**asdict(row), "ratio": row.ratio} for row in passes]
            for route, passes in zip(ROUTES, rows, strict=True)
        },
        "wrong_bytes": wrong_bytes(rows),
        "late": late(rows),
        "in_order": in_order(rows),
    }


def table(arguments: argparse.Namespace, rows: list[list[PassRow]]) -> str:
    mask = "causal" if arguments.link_causal else "full"
    lines = [
        f"{NODES} nodes of {RANKS // NODES} Gloo ranks, {arguments.rate_mbit} Mbit/s each way between them; "
        f"{arguments.link_tokens} tokens, {arguments.link_heads} heads of 64, {mask}, zigzag, fp32; exchange-only, "
        f"{arguments.link_repeats} interleaved repeats, median (min-max); load {load()}",
        "",
        "| route | pass | bytes from node 0 / 1, by formula | counted by ranks | link's counter beyond it and headers "
        "| time, s | bytes / rate, s | in their order, s | ratio to it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for route, passes in zip(ROUTES, rows, strict=True):
        for row in passes:
            counted = "equal" if row.edges_equal else " / ".join(f"**{node.counted:,}**" for node in row.nodes)
            lines.append(
                f"| {route} | {row.name} | {' / '.join(f'{node.formula:,}' for node in row.nodes)} | {counted} "
                f"| {' / '.join(f'{node.unexplained:+.2%}' for node in row.nodes)} "
                f"| {row.seconds.median:.3f} ({row.seconds.low:.3f}-{row.seconds.high:.3f}) | {row.busy:.3f} "
                f"| {row.predicted:.3f} | {row.ratio:.3f} |"
            )
        both, busy, chained = (
            sum(times) for times in zip(*((row.seconds.median, row.busy, row.predicted) for row in passes), strict=True)
        )
        lines.append(f"| {route} | both | | | | {both:.3f} | {busy:.3f} | {chained:.3f} | {both / chained:.3f} |")
    slow = f"**no**: {', '.join(late(rows))}" if late(rows) else "yes"
    lines += ["", f"time within {LATE - 1:.0%} of bytes / rate in their order: {slow}"]
    return "\n".join([*lines, f"order of the three as predicted: {'yes' if in_order(rows) else '**no**'}"])


def worker(words: list[str]) -> None:
    with gloo_rank(words) as (job, folder, rank):
        cases = [VerifyCase.of(case) for case in job["cases"]]
        report = to_file(folder, rank)
        report(0, 0, "checking over the link")
        compute_here(cases, folder, rank)
        with silent_kernel():
            seen = measure(cases, job["repeats"], link_counters, report)
        plain = [[[asdict(passed) for passed in both] for both in repeats] for repeats in seen]
        (folder / f"measured-{rank}.json").write_text(json.dumps(plain))


if __name__ == "__main__":
    worker(sys.argv[1:])
