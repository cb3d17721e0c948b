"""``report.html``: what became of a run, in one file that needs no network and no script.

Made from the files of the run alone, so that it can be made again at any time.
"""

from __future__ import annotations

import html
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from longctx.checkpoint.files import CheckpointDirectory
from longctx.config import Config
from longctx.errors import StorageError
from longctx.reporting.memory import MEMORY
from longctx.reporting.metrics_file import METRICS, read_records
from longctx.reporting.progress import duration, quantity
from longctx.reporting.report.balance import balance_section
from longctx.reporting.report.chart import line_chart
from longctx.reporting.report.memory_bars import memory_section
from longctx.reporting.tracker import redacted

REPORT = "report.html"
_LARGEST_FILE = 1 << 20  # of config.yaml and environment.json
_UNKNOWN = "unknown"

Records = list[dict[str, Any]]


def write_report(run_dir: Path) -> Path:
    """Makes ``report.html`` anew from the run's JSON files and ``config.yaml``.

    Missing files leave their part out. Raises ``StorageError`` when the report cannot be written.
    """
    path, unfinished = run_dir / REPORT, run_dir / f".{REPORT}.new"
    page = render(run_dir)
    try:
        unfinished.unlink(missing_ok=True)
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        unfinished.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def render(run_dir: Path) -> str:
    """The page."""
    records = list(read_records(run_dir / METRICS))
    text = redacted(_read(run_dir / "config.yaml"))
    config = Config.from_run(yaml.safe_load(text)) if text else None
    name = (config.run.name if config else None) or run_dir.resolve().name
    return _PAGE.format(
        title=html.escape(name),
        style=_STYLE,
        subtitle=html.escape(_outcome(records, config)),
        tiles="".join(_tile(label, value) for label, value in _headline(records)),
        charts="".join(_chart(records, *chart) for chart in _CHARTS),
        memory=memory_section(_read(run_dir / MEMORY)),
        balance=balance_section(records),
        rows="".join(_row(label, value) for label, value in _facts(run_dir, records, config)),
        config=f"<details><summary>config.yaml</summary><pre>{html.escape(text)}</pre></details>" if text else "",
    )


def _outcome(records: Records, config: Config | None) -> str:
    done = records[-1]["step"] if records else 0
    if config is None:
        return f"{done} steps"
    state = "finished" if done >= config.train.steps else "stopped early"
    return f"{state}: {done} of {config.train.steps} steps"


def _headline(records: Records) -> list[tuple[str, str]]:
    losses = _known(records, "loss")
    return [
        ("final loss", f"{losses[-1]:.4f}" if losses else _UNKNOWN),
        ("best loss", f"{min(losses):.4f}" if losses else _UNKNOWN),
        ("tokens per second, median", _median(records, "tokens_per_second", quantity)),
        ("tokens", quantity(sum(_known(records, "tokens")))),
        ("time in steps", duration(sum(_known(records, "step_seconds")))),
    ]


def _facts(run_dir: Path, records: Records, config: Config | None) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if config is not None:
        facts += _described(config)
    facts += [
        ("balance of attention work, median", _median(records, "balance", lambda value: f"{value:.3f}")),
        ("bytes sent by attention per step, median", _median(records, "comm_bytes", _bytes)),
        ("of these between nodes, median", _median(records, "comm_bytes_between_nodes", _bytes)),
        ("MFU, causal, median", _median(records, "mfu_causal", lambda value: f"{value:.1%}")),
        ("peak memory", _bytes(max(_known(records, "memory_peak_bytes"), default=None))),
    ]
    not_finite = [record["step"] for record in records if record.get("nonfinite")]
    if not_finite:
        facts.append(("steps with numbers that were not finite", ", ".join(map(str, not_finite[:20]))))
    steps = CheckpointDirectory(run_dir / "checkpoints").steps()
    newest = str(Path("checkpoints") / f"step-{steps[-1]}") if steps else "none"
    return [*facts, ("newest checkpoint", newest), *_environment(run_dir)]


def _described(config: Config) -> list[tuple[str, str]]:
    model, mesh, attention = config.model, config.parallel, config.attention
    return [
        ("model", f"{model.name}: {model.layers} layers, width {model.dim}, {model.heads} heads"),
        (
            "data",
            f"{config.data.source}, {config.data.seq_len} tokens × {config.train.global_batch} per step",
        ),
        ("mesh", " × ".join(f"{axis} {size}" for axis, size in vars(mesh).items() if size != 1) or "1 rank"),
        ("attention", f"{attention.strategy}, layout {attention.layout or 'of the strategy'}"),
        ("arithmetic", f"{config.train.dtype} over {config.comm.backend}"),
    ]


def _environment(run_dir: Path) -> list[tuple[str, str]]:
    try:
        environment = json.loads(_read(run_dir / "environment.json") or "{}")
    except (ValueError, RecursionError):
        return []
    if type(environment) is not dict:
        return []
    facts = [("commit", str(environment["git_commit"]))] if environment.get("git_commit") else []
    canary = environment.get("canary")
    if type(canary) is dict and "passed" in canary:
        verdict = "passed" if canary["passed"] is True else "failed"
        error, worst, tolerance = (canary.get(key) for key in ("error", "worst", "tolerance"))
        verdict += f": worst error {error} in {worst}, tolerance {tolerance}"
        facts.append(("start-up canary against the dense step", verdict))
    return facts


_CHARTS: tuple[tuple[str, str, bool, Callable[[float], str]], ...] = (
    ("loss", "loss, nats per token", True, lambda value: f"{value:.4g}"),
    ("tokens_per_second", "tokens per second", True, quantity),
    ("grad_norm", "gradient norm", True, lambda value: f"{value:.3g}"),
    ("lr", "learning rate", False, lambda value: f"{value:.2g}"),
)


def _chart(records: Records, key: str, label: str, smooth: bool, form: Callable[[float], str]) -> str:
    steps = [record["step"] for record in records]
    drawn = line_chart(label, steps, [_number(record.get(key)) for record in records], form, smooth)
    note = " <small>each step, and a moving average</small>" if smooth else ""
    return f"<figure><figcaption>{html.escape(label)}{note}</figcaption>{drawn}</figure>"


def _tile(label: str, value: str) -> str:
    return f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"


def _row(label: str, value: str) -> str:
    return f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) else None


def _known(records: Records, key: str) -> list[float]:
    return [value for record in records if (value := _number(record.get(key))) is not None]


def _median(records: Records, key: str, form: Callable[[float], str]) -> str:
    values = _known(records, key)
    return form(statistics.median(values)) if values else _UNKNOWN


def _bytes(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{quantity(value)}B"


def _read(path: Path) -> str:
    """A small text file of the run, empty where there is none."""
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707f; --paper: #f6f7f9; --card: #fff;
  --edge: #e1e5ea; --line: #2563c9; --raw: #a9c4ee; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b1; --paper: #14181e; --card: #1c222a; --edge: #2e3742;
    --line: #6ea4ff; --raw: #34527f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
header p { margin: .2rem 0 1.5rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; }
.tiles div, figure, table, details { background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; }
.tiles div { padding: .9rem 1.1rem; }
.tiles b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.tiles span, small, figcaption small { color: var(--soft); font-size: .82rem; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; padding: 1rem 1.1rem .6rem; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--edge); stroke-width: 1; }
polyline { fill: none; stroke-linejoin: round; }
.line { stroke: var(--line); stroke-width: 2; }
.raw { stroke: var(--raw); stroke-width: 1.2; }
.dot { fill: var(--line); stroke: none; }
.hint { fill: transparent; }
.hint:hover { fill: var(--line); }
.share { fill: var(--line); }
figure table { border: 0; margin: 0; font-variant-numeric: tabular-nums; }
figure td:last-child { width: 50%; vertical-align: middle; }
table { width: 100%; border-collapse: separate; border-spacing: 0; margin-bottom: 1rem; padding: .3rem 0; }
th, td { padding: .45rem 1.1rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; width: 22rem; }
details { padding: .7rem 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .82rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title} · longctx</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
<div class="tiles">{tiles}</div>
<div class="charts">{charts}</div>
{memory}
{balance}
<table>{rows}</table>
{config}
</body>
</html>
"""
