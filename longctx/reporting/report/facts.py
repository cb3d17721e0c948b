"""Puts a run into words for the report: the headline figures, and facts by topic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.reporting.report.run_files import UNKNOWN, RunFiles
from longctx.reporting.units import duration, quantity

# The axes of the mesh from the outermost to the innermost, and what each of them splits.
AXES = {
    "dp_replicate": "replicas",
    "dp_shard": "data-parallel shards",
    "sp": "sequence parallel",
    "tp": "tensor parallel",
    "pp": "pipeline stages",
}
_MOST_STEPS = 20  # that a list names


@dataclass(frozen=True)
class Figure:
    """Holds one headline figure: what it is, its value, and a note below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Fact:
    """Holds one line of a card: what it is about, and what is so."""

    name: str
    value: str


@dataclass(frozen=True)
class Card:
    """Holds facts about one topic; ``verdict``: passed, failed, or None where nothing was judged."""

    title: str
    facts: list[Fact]
    verdict: bool | None = None


def outcome(run: RunFiles) -> str:
    """Says how far the run came."""
    done = _steps_done(run)
    steps = run.setting("train", "steps")
    if type(steps) is not int:
        return f"{done} steps"
    return f"{'finished' if done >= steps else 'stopped early'}: {done} of {steps} steps"


def figures(run: RunFiles) -> list[Figure]:
    """Computes the headline figures."""
    mesh = MeshFacts.of(run)
    peak = max(run.known("memory_peak_bytes"), default=None)
    shown = [
        _loss(run, "loss", "final loss"),
        *([_loss(run, "validation_loss", "validation loss")] if run.known("validation_loss") else []),
        Figure("tokens/s", run.median("tokens_per_second", quantity), "median of all steps"),
        Figure("steps", f"{_steps_done(run)}", f"{run.median('step_seconds', _seconds)} each, median"),
        Figure("tokens", quantity(sum(run.known("tokens"))), f"{run.median('tokens', quantity)} a step"),
        Figure("time in steps", duration(sum(run.known("step_seconds"))), "without start and checkpoints"),
        Figure("mesh", mesh.ranks, mesh.axes),
    ]
    return shown if peak is None else [*shown, Figure("peak memory", _bytes(peak), "largest of all ranks")]


def cards(run: RunFiles) -> list[Card]:
    """Collects facts by topic; topics of which nothing is known are left out."""
    every = [_setup(run), _costs(run), _canary(run), _checkpoints(run), _environment(run)]
    return [card for card in every if card.facts]


def _steps_done(run: RunFiles) -> int:
    return run.records[-1]["step"] if run.records else 0


def _loss(run: RunFiles, key: str, label: str) -> Figure:
    by_step = [(value, record["step"]) for value, record in zip(run.column(key), run.records) if value is not None]
    if not by_step:
        return Figure(label, UNKNOWN)
    best, step = min(by_step)
    return Figure(label, f"{by_step[-1][0]:.4f}", f"lowest {best:.4f}, in step {step}")


@dataclass(frozen=True)
class MeshFacts:
    """Holds the mesh in words: how many ranks, the axes above 1, and the same with what they split."""

    ranks: str
    axes: str
    described: str

    @classmethod
    def of(cls, run: RunFiles) -> MeshFacts:
        """Puts ``parallel`` of the configuration into words."""
        degrees = {axis: run.setting("parallel", axis) for axis in AXES}
        if not all(type(degree) is int for degree in degrees.values()):
            return cls(UNKNOWN, "", "")
        wide = {axis: degree for axis, degree in degrees.items() if degree != 1}
        if not wide:
            return cls("one rank", "", "one rank")
        total = math.prod(wide.values())
        return cls(
            f"{total} ranks" if total > 0 else "all ranks",  # dp_shard is -1 where it was never resolved
            " × ".join(f"{axis} {degree}" for axis, degree in wide.items()),
            " × ".join(f"{axis} {degree} ({AXES[axis]})" for axis, degree in wide.items()),
        )


def _setup(run: RunFiles) -> Card:
    settings = [
        ("model", "{model.name}: {model.layers} layers, width {model.dim}, {model.heads} heads"),
        ("data", "{data.source}, {data.seq_len} tokens × {train.global_batch} per step"),
        ("attention", "{attention.strategy}, layout {attention.layout}"),
        ("arithmetic", "{train.dtype} over {comm.backend}"),
    ]
    facts = [Fact(name, words) for name, form in settings if (words := _worded(run, form))]
    mesh = MeshFacts.of(run)
    if mesh.described:
        facts.insert(1, Fact("mesh", mesh.described))
    if run.setting("parallel", "pp") not in (None, 1):
        facts.append(Fact("pipeline schedule", str(run.setting("parallel", "pp_schedule"))))
    return Card("Set-up", facts)


def _worded(run: RunFiles, form: str) -> str:
    """Fills ``form`` with the values of each ``{section.key}`` in it; empty where one is missing."""
    words = form
    for field in [part.split("}")[0] for part in form.split("{")[1:]]:
        section, key = field.split(".")
        value = run.setting(section, key)
        if value is None and key != "layout":
            return ""
        words = words.replace(f"{{{field}}}", "of the strategy" if value is None else str(value), 1)
    return words


def _costs(run: RunFiles) -> Card:
    facts = [
        Fact("balance of attention work, median", run.median("balance", lambda value: f"{value:.3f}")),
        Fact("bytes sent by attention per step, median", run.median("comm_bytes", _bytes)),
        Fact("of these between nodes, median", run.median("comm_bytes_between_nodes", _bytes)),
        Fact("MFU, causal, median", run.median("mfu_causal", lambda value: f"{value:.1%}")),
        Fact("padding, median", run.median("padding", lambda value: f"{value:.1%}")),
    ]
    odd = [record["step"] for record in run.records if record.get("nonfinite")]
    if odd:
        more = f" and {len(odd) - _MOST_STEPS} more" if len(odd) > _MOST_STEPS else ""
        facts.append(Fact("steps with numbers that were not finite", ", ".join(map(str, odd[:_MOST_STEPS])) + more))
    return Card("Cost of a step", facts)


def _canary(run: RunFiles) -> Card:
    canary = run.environment.get("canary")
    if type(canary) is not dict or "passed" not in canary:
        return Card("Start-up canary", [])
    passed = canary["passed"] is True
    error, worst, tolerance = (canary.get(key) for key in ("error", "worst", "tolerance"))
    verdict = (
        f"{'passed' if passed else 'failed'}: worst error {_short(error)} in {worst}, tolerance {_short(tolerance)}"
    )
    return Card("Start-up canary", [Fact("against the dense step", verdict)], passed)


def _checkpoints(run: RunFiles) -> Card:
    if not run.checkpoints:
        return Card("Checkpoints", [Fact("newest", "none")])
    newest = Fact("newest", str(Path("checkpoints") / f"step-{run.checkpoints[-1]}"))
    kept = ", ".join(map(str, run.checkpoints[-_MOST_STEPS:]))
    return Card("Checkpoints", [newest, Fact("steps kept", kept)])


def _environment(run: RunFiles) -> Card:
    told = run.environment
    packages, data = (_mapping(told.get(key)) for key in ("packages", "data"))
    devices = _names(told.get("devices"))
    memory = told.get("memory_bytes")
    lines: list[tuple[str, Any]] = [
        ("commit", told.get("git_commit")),
        ("longctx", told.get("longctx")),
        ("Python", told.get("python")),
        *((name, version) for name, version in packages.items()),
        ("system", told.get("system")),
        ("processor", _processor(told)),
        ("host memory", _bytes(memory) if type(memory) is int else None),
        ("devices", ", ".join(sorted({f"{devices.count(name)} × {name}" for name in devices}))),
        *((f"{name} in the corpus".replace("_", " "), value) for name, value in data.items() if type(value) is int),
        *((f"{kind} files of the corpus", count) for kind, count in _mapping(data.get("files")).items()),
        *((f"left out of the corpus: {what}", count) for what, count in _mapping(data.get("left_out")).items()),
    ]
    return Card("Environment", [Fact(str(name), str(value)) for name, value in lines if value not in (None, "", {})])


def _mapping(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}


def _names(value: Any) -> list[str]:
    return [str(item) for item in value] if type(value) is list else []


def _processor(told: dict[str, Any]) -> str | None:
    cores = told.get("cores")
    return f"{told.get('processor') or UNKNOWN}, {cores} cores" if cores else told.get("processor")


def _short(value: Any) -> str:
    return f"{value:.3g}" if type(value) in (int, float) else str(value)


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _bytes(value: float) -> str:
    return f"{quantity(value)}B"
