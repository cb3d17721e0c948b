"""Runs the second half of ``python -m benchmarks linear``: four nodes of one rank each, late links between them.

LASP-2, LASP and a ring of keys and values (the softmax strategy ``ring``) run as they are, with computing. Sequences
are so short that latency is what counts. Before that each computes over the same links, and is compared with its
reference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.commands.link import compute_here, require_exact_here
from benchmarks.hosts.namespaces import NETWORK, Namespaces
from benchmarks.late_link import CLOSE, HEAD_START, Exposed, ExposedRatio, PassTimeline, in_order, judged, measure
from benchmarks.link import PASSES
from longctx.bench.timing import Report, Timing
from longctx.comm import ExchangeEvent
from longctx.errors import ConfigError
from longctx.launcher.machine import load
from longctx.launcher.processes import Workers, gloo_rank, run_gloo, unwind_on_stop
from longctx.launcher.progress import to_file
from longctx.verify import VerifyCase

RANKS = 4  # a node each
HEADS, HEAD_DIM = 2, 32
ROUTES = ("LASP-2", "LASP", "ring of keys and values")
PASSED_ROUND = 50  # words of one byte
PORT = 7077


@dataclass(frozen=True)
class LateTimes:
    """Holds what was measured over late links.

    ``one_way``: milliseconds, half of a small word's round trip. ``exposed``: waiting, by route and pass.
    """

    one_way: Timing
    exposed: dict[str, dict[str, Exposed]]
    errors: dict[str, dict[str, float]]

    @property
    def both(self) -> list[Exposed]:
        """Adds forward and backward, by route."""
        return [passes[PASSES[0]] + passes[PASSES[1]] for passes in self.exposed.values()]

    @property
    def ratios(self) -> dict[str, ExposedRatio]:
        """Returns the exposed waiting of the other routes over LASP-2's."""
        first, *others = self.both
        return {route: ExposedRatio.of(one, first) for route, one in zip(ROUTES[1:], others, strict=True)}


def cases_of(arguments: argparse.Namespace, mixer: str | None) -> list[VerifyCase]:
    """Returns one case for each route, on the same tokens and heads."""
    if arguments.latency_ms <= 0 or arguments.latency_ms >= HEAD_START * 1e3 / RANKS:
        raise ConfigError(
            f"--latency-ms {arguments.latency_ms} must be above 0 and below {HEAD_START * 1e3 / RANKS}, so that ranks "
            "can agree on a start; 5 is the default"
        )
    if arguments.latency_tokens < RANKS:
        raise ConfigError(
            f"--latency-tokens {arguments.latency_tokens} must be at least {RANKS}: a token for each rank"
        )
    linear = VerifyCase(
        "lasp2", "contiguous", RANKS, "gloo", arguments.latency_tokens,
        heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, dtype="float32", mixer=mixer,
    )  # fmt: skip
    return [linear, replace(linear, strategy="lasp"), replace(linear, strategy="ring", layout="zigzag", mixer=None)]


def measured(cases: Sequence[VerifyCase], arguments: argparse.Namespace, show: Report) -> LateTimes:
    with (
        unwind_on_stop(),
        Namespaces(RANKS, None, arguments.latency_ms) as nodes,
        tempfile.TemporaryDirectory(prefix="longctx-bench-") as name,
    ):
        folder = Path(name)
        one_way = measured_latency(nodes)
        job = json.dumps({"cases": [asdict(case) for case in cases], "repeats": arguments.repeats})
        prefixes = [nodes.prefix(rank) for rank in range(RANKS)]
        run_gloo("benchmarks.commands.late_link", job, RANKS, folder, Workers(prefixes=prefixes, report=show))
        errors = require_exact_here(cases, folder)
        ranks = [json.loads((folder / f"measured-{rank}.json").read_text()) for rank in range(RANKS)]
    exposed = {
        route: judged([_timelines(rank[number]) for rank in ranks], arguments.latency_ms / 1e3)
        for number, route in enumerate(ROUTES)
    }
    return LateTimes(one_way, exposed, dict(zip(ROUTES, errors, strict=True)))


def _timelines(repeats: list[list[dict[str, Any]]]) -> list[list[PassTimeline]]:
    return [
        [
            PassTimeline(one["started"], one["ended"], tuple(_moment(fields) for fields in one["timeline"]))
            for one in both
        ]
        for both in repeats
    ]


def _moment(fields: list[Any]) -> ExchangeEvent:
    return ExchangeEvent(*fields[:4], *map(tuple, fields[4:]))


# One process sends every byte back that comes; the other tells half the time of each.
ECHO = """
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if not host:
    with socket.create_server(("", port)) as server:
        print("ready", flush=True)
        peer = server.accept()[0]
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while word := peer.recv(1):
            peer.sendall(word)
else:
    with socket.create_connection((host, port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start = time.perf_counter()
            peer.sendall(b"x")
            peer.recv(1)
            print((time.perf_counter() - start) * 500)
"""


def measured_latency(nodes: Namespaces) -> Timing:
    """Measures milliseconds one way between the first node and the last, as a small word finds them."""
    words = [sys.executable, "-c", ECHO]
    numbers = [str(PORT), str(PASSED_ROUND)]
    with subprocess.Popen([*nodes.prefix(0), *words, "", *numbers], stdout=subprocess.PIPE) as echo:
        assert echo.stdout is not None and echo.stdout.readline() == b"ready\n"
        done = subprocess.run(
            [*nodes.prefix(RANKS - 1), *words, f"{NETWORK}.1", *numbers],
            capture_output=True,
            text=True,
            check=True,
        )
    return Timing.of([float(line) for line in done.stdout.split()])


def as_json(late: LateTimes) -> dict[str, object]:
    return {
        "one_way_ms": asdict(late.one_way),
        "errors": late.errors,
        "exposed": {
            route: {name: asdict(one) for name, one in passes.items()} for route, passes in late.exposed.items()
        },
        "ratios": {
            route: {**asdict(ratio), "deviation": ratio.deviation, "close": ratio.close}
            for route, ratio in late.ratios.items()
        },
        "least_is_lasp2": in_order(late.both),
    }


def report(late: LateTimes, arguments: argparse.Namespace) -> str:
    lines = [
        f"{RANKS} nodes of one Gloo rank, {arguments.latency_ms:g} ms one way between them (a small word takes "
        f"{_ms(late.one_way, 1.0)} ms); {arguments.latency_tokens} tokens, {HEADS} heads of {HEAD_DIM}, float32; "
        f"exposed: waits for exchanges on the rank that waits longest; {arguments.repeats} interleaved repeats, median "
        f"(min-max); load {load()}",
        "",
        "| route | pass | exposed, ms | by replay of the trace, ms | deviation |",
        "|---|---|---|---|---|",
    ]
    for (route, passes), both in zip(late.exposed.items(), late.both, strict=True):
        for name, one in {**passes, "both": both}.items():
            own, predicted = Timing.of(one.measured), Timing.of(one.predicted)
            lines.append(f"| {route} | {name} | {_ms(own)} | {_ms(predicted)} | {_off(own, predicted)} |")
    lines.append("")
    for route, ratio in late.ratios.items():
        lines.append(
            f"{route} exposes {ratio.measured.median:.2f} times as much as LASP-2; the traces predict "
            f"{ratio.predicted.median:.2f}: {ratio.deviation:+.0%} ({'kept' if ratio.close else '**not kept**'}: "
            f"{CLOSE:.0%})"
        )
    lines.append(f"LASP-2 exposes the least: {'yes' if in_order(late.both) else '**no**'}")
    return "\n".join(lines)


def _ms(timing: Timing, scale: float = 1e3) -> str:
    low, median, high = (f"{one * scale:.1f}" for one in (timing.low, timing.median, timing.high))
    return f"{median} ({low}-{high})"


def _off(own: Timing, predicted: Timing) -> str:
    return f"{own.median / predicted.median - 1:+.0%}" if predicted.median else ""


def worker(words: list[str]) -> None:
    with gloo_rank(words) as (job, folder, rank):
        cases = [VerifyCase.of(case) for case in job["cases"]]
        show = to_file(folder, rank)
        show(0, 0, "checking over the links")
        compute_here(cases, folder, rank)
        seen = measure(cases, job["repeats"], show)
        plain = [[[asdict(one) for one in both] for both in repeats] for repeats in seen]
        (folder / f"measured-{rank}.json").write_text(json.dumps(plain))


if __name__ == "__main__":
    worker(sys.argv[1:])
