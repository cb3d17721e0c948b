"""``python -m benchmarks context`` finds the longest sequence that trains in fixed memory, here and elsewhere."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.commands.context_worker import Job
from benchmarks.hosts import memory_group
from benchmarks.hosts.memory_group import MemoryGroup
from benchmarks.longest import Longest, longest
from benchmarks.options import add_overrides, add_peer_python
from longctx.bench.timing import Report
from longctx.config import Config, resolve
from longctx.errors import ConfigError, NumericsError
from longctx.launcher import env
from longctx.launcher.compose import compose, refuse_overrides
from longctx.launcher.machine import described
from longctx.launcher.processes import run_together, unwind_on_stop
from longctx.launcher.progress import progress

WORLD = 2
OURS = "longctx"
SYSTEMS = {
    "torch": "PyTorch: context parallel, FSDP2, full recompute",
    "ulysses": "DeepSpeed: Ulysses, ZeRO-3, tiled MLP and loss, full recompute",
    OURS: "longctx: ring zigzag, FSDP2 over sp, recompute, chunked loss",
}
PACKAGES = {"ulysses": "deepspeed"}
TILED = ("ulysses", OURS)
UNTILED_UNIT = 128  # tokens: zigzag cuts them in four, and that is fine enough

FOOTPRINTS = {"optimizer": "after the optimizer's creation", "step": "after one short step"}

# The model of the comparison, and an optimizer that all systems have in common.
MODEL = (
    "model.vocab_size=32000", "model.dim=256", "model.layers=4", "model.heads=8", "model.kv_heads=8",
    "model.head_dim=32", "model.hidden_dim=688", "model.tie_embeddings=false", "model.init_std=0.04",
    "optim.lr=1e-3", "optim.beta2=0.999", "optim.weight_decay=0", "optim.grad_clip=null",
)  # fmt: skip
LEVERS = ("parallel.sp=2", "train.recompute=full", "train.global_batch=1")
GATE_STEPS, GATE_TOLERANCE = 3, 1e-4  # of the loss, relative, at every step
PATIENCE = 600.0  # seconds that one probe may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which to measure, comma-separated")
    parser.add_argument("--allowance", type=int, default=512, help="MiB over what a process takes before its step")
    parser.add_argument(
        "--footprint", choices=FOOTPRINTS, default="optimizer", help="when it is read: before or after a short step"
    )
    parser.add_argument("--tile", type=int, default=256, help="tokens of a tile, where a system cuts loss or MLP")
    parser.add_argument("--start", default="4096", help="tokens of the first probe, or one number per system")
    parser.add_argument("--cap", type=int, default=65536, help="longest probe; a system that fits is reported as more")
    add_overrides(parser)
    add_peer_python(parser)


def run(arguments: argparse.Namespace) -> int:
    systems = arguments.systems.split(",")
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown:
        raise ConfigError(f"--systems {unknown[0]!r} is unknown; valid: {', '.join(SYSTEMS)}")
    _check(arguments, systems)
    starts = _starts(arguments, systems)
    memory_group.require()
    rows = []
    with (
        unwind_on_stop(),
        progress("benchmarks context") as report,
        tempfile.TemporaryDirectory(prefix="longctx-bench-") as folder,
    ):
        bench = _Bench(arguments, Path(folder), report)
        present = {name: bench.missing(name) for name in systems}
        bench.require_equal_losses([name for name in systems if not present[name]])
        for name, start in zip(systems, starts, strict=True):
            row: dict[str, Any] = {"system": name, "missing": present[name]}
            if not present[name]:
                row |= bench.search(name, start)
            rows.append(row)
    if arguments.json:
        print(json.dumps({"machine": described(), "allowance_mib": arguments.allowance, "rows": rows}))
    else:
        print(table(arguments, rows))
    return 0


def _check(arguments: argparse.Namespace, systems: Sequence[str]) -> None:
    for name in ("tile", "allowance"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be at least 1")
    if len(set(systems)) < len(systems):
        raise ConfigError(f"--systems {','.join(systems)} names one twice; name each once")
    refuse_overrides(arguments.overrides, ("data.seq_len", "train.loss_chunk", "train.steps", "comm"))


def _starts(arguments: argparse.Namespace, systems: Sequence[str]) -> list[int]:
    try:
        numbers = [int(word) for word in arguments.start.split(",")]
    except ValueError:
        raise ConfigError(f"--start {arguments.start!r} must be whole numbers with commas between") from None
    if len(numbers) not in (1, len(systems)):
        raise ConfigError(
            f"--start {arguments.start!r} has {len(numbers)} numbers; give 1 or {len(systems)}, one per system"
        )
    numbers *= len(systems) // len(numbers)
    for system, number in zip(systems, numbers, strict=True):
        unit = _unit(arguments, system)
        for tokens in (number, arguments.cap):
            if tokens < unit or tokens % unit:
                raise ConfigError(f"{tokens} tokens must be a multiple of {unit} for {system} on {WORLD} processes")
        if number > arguments.cap:
            raise ConfigError(f"--start {number} must not exceed --cap {arguments.cap}; raise --cap")
    return numbers


def _unit(arguments: argparse.Namespace, system: str) -> int:
    """Returns the number of tokens that every length is a multiple of."""
    return WORLD * arguments.tile if system in TILED else UNTILED_UNIT


@dataclass(frozen=True)
class Probe:
    """Tells what became of one launch: ``answers`` by rank, or None when memory or time did not suffice."""

    answers: list[dict[str, Any]] | None
    seconds: float
    slow: bool = False


class _Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path, report: Report) -> None:
        self._arguments = arguments
        self._report = report
        self._folder = folder
        self._launches = 0

    def missing(self, system: str) -> str | None:
        """Names the package that the system's interpreter lacks, None where it has all."""
        package = PACKAGES.get(system)
        if package is None:
            return None
        asked = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        return package if subprocess.run([self._python(system), "-c", asked], check=False).returncode else None

    def require_equal_losses(self, systems: Sequence[str]) -> None:
        """Refuses to compare systems that do not compute the same: takes a few steps, without a limit."""
        seen: dict[str, list[float]] = {}
        for name in systems:
            answers = self.launch(name, 4 * WORLD * self._arguments.tile, GATE_STEPS, limited=False).answers
            assert answers is not None, "nothing is killed without a limit"
            seen[name] = answers[0]["losses"]
        for name, losses in seen.items():
            for step, (one, other) in enumerate(zip(losses, next(iter(seen.values())), strict=True), start=1):
                if abs(one - other) > GATE_TOLERANCE * other:
                    raise NumericsError(f"step {step}: the losses of {seen} differ; {name} is not comparable")

    def search(self, system: str, start: int) -> dict[str, Any]:
        best: dict[str, Any] = {}
        probes: list[dict[str, Any]] = []

        def fits(tokens: int) -> bool:
            probe = self.launch(system, tokens, 1, limited=True)
            outcome = "fits" if probe.answers is not None else "slow" if probe.slow else "killed"
            probes.append({"tokens": tokens, "outcome": outcome, "seconds": round(probe.seconds, 1)})
            print(f"{system}: {probes[-1]}", file=sys.stderr, flush=True)
            if probe.answers is not None and tokens > best.get("tokens", 0):
                best.update(tokens=tokens, rank0=probe.answers[0])
            return probe.answers is not None

        found: Longest = longest(fits, start, self._arguments.cap, _unit(self._arguments, system))
        if any(probe["tokens"] == found.fails and probe["outcome"] == "slow" for probe in probes):
            found = replace(found, fails=None)  # nobody knows whether it would have fitted
        return {**asdict(found), "probes": probes, "at_longest": best.get("rank0")}

    def launch(self, system: str, tokens: int, steps: int, limited: bool) -> Probe:
        self._launches += 1
        self._report(0, 0, f"launch {self._launches}: {system} with {tokens} tokens{'' if limited else ', no limit'}")
        started = time.perf_counter()
        meeting = self._folder / str(self._launches)
        meeting.mkdir()
        groups = [
            MemoryGroup(memory_group.ROOT / f"longctx-{self._folder.name}-{self._launches}-{rank}")
            for rank in range(WORLD)
        ]
        config, tile = self._config(system, tokens), self._arguments.tile
        warm = WORLD * tile if limited and self._arguments.footprint == "step" else 0
        with groups[0], groups[1]:

            def start(rank: int) -> subprocess.Popen[bytes]:
                job = Job(
                    system, tokens, steps, tile, self._arguments.allowance << 20, warm, config.to_dict(),
                    str(meeting), rank, WORLD, str(groups[rank].folder) if limited else None,
                )  # fmt: skip
                return self._start(system, meeting, job)

            ends = run_together(start, WORLD, PATIENCE)
            killed = any(group.killed() for group in groups)
        seconds = time.perf_counter() - started
        if killed or not ends.in_time:
            return Probe(None, seconds, slow=not killed)
        if ends.failed is not None:
            last = (meeting / f"complaints-{ends.failed}.txt").read_text(errors="replace").strip().splitlines()[-3:]
            status = ends.statuses[ends.failed]
            raise NumericsError(f"{system}: rank {ends.failed} ended with {status}: {' '.join(last)}")
        return Probe([json.loads((meeting / f"answer-{rank}.json").read_text()) for rank in range(WORLD)], seconds)

    def _start(self, system: str, meeting: Path, job: Job) -> subprocess.Popen[bytes]:
        with (meeting / f"complaints-{job.rank}.txt").open("wb") as complaints:
            return subprocess.Popen(
                [self._python(system), "-m", "benchmarks.commands.context_worker", json.dumps(asdict(job))],
                env=env.benchmark_environment(env.RankEnvironment(job.rank, WORLD, job.rank)),
                stdout=complaints,
                stderr=complaints,
            )

    def _config(self, system: str, tokens: int) -> Config:
        levers = [*LEVERS, f"train.loss_chunk={self._arguments.tile}", *self._arguments.overrides]
        chosen = [*MODEL, f"data.seq_len={tokens}", "logger=none", *levers]
        return resolve(compose(chosen), WORLD)

    def _python(self, system: str) -> str:
        return str(self._arguments.peer_python) if system != OURS else sys.executable


def table(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    ours = next((row.get("fits") for row in rows if row["system"] == OURS), None)
    lines = [
        f"one training step, {WORLD} Gloo processes of one thread, fp32, 4 layers x 256, vocabulary 32,000; each held "
        f"to its memory {FOOTPRINTS[arguments.footprint]} + {arguments.allowance} MiB",
        "",
        "| system | tokens per sequence | longctx is ahead by | probes |",
        "|---|---|---|---|",
    ]
    for row in rows:
        name = SYSTEMS[row["system"]]
        if row["missing"]:
            lines.append(f"| {name} | not installed: {row['missing']} | | |")
            continue
        ahead = f"{ours / row['fits']:.2f}x" if ours and row["fits"] else ""
        reached = f"{'' if row['fails'] else '>= '}{row['fits']}"
        lines.append(f"| {name} | {reached} | {ahead} | {len(row['probes'])} |")
    for row in rows:
        if row.get("at_longest"):
            lines += ["", *_memory(row)]
    return "\n".join(lines)


def _memory(row: dict[str, Any]) -> list[str]:
    """Writes the bytes by category of rank 0 at the longest length that fits."""
    at = row["at_longest"]
    parts = {"footprint": at["footprint"], **(at["bytes"] or {}), "peak": at["peak"]}
    told = ", ".join(f"{name} {count / 2**20:.1f}" for name, count in parts.items())
    return [f"{row['system']} at {row['fits']} tokens, MiB of rank 0: {told}"]
