"""Makes ``report.html``: what became of a run, in one file that needs no network and no script.

Made from the files of the run alone, so that it can be made again at any time. What each part says is computed in a
module of its own; how it looks stands in ``templates/``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import StorageError
from longctx.reporting.report.balance import balance_section
from longctx.reporting.report.chart import SMOOTH_FROM, Form, line_chart
from longctx.reporting.report.facts import cards, figures, outcome
from longctx.reporting.report.memory_bars import memory_section
from longctx.reporting.report.run_files import RunFiles
from longctx.reporting.report.settings import changed_settings
from longctx.reporting.report.templating import fill
from longctx.reporting.units import quantity

if TYPE_CHECKING:
    from markupsafe import Markup

REPORT = "report.html"


@dataclass(frozen=True)
class Curve:
    """Says what one chart shows: a key of ``metrics.jsonl``, its title, and how its values are written.

    ``sparse``: only some steps have a value, and the line goes from one to the next.
    """

    key: str
    title: str
    form: Form
    smooth: bool = True
    sparse: bool = False


CURVES = (
    Curve("loss", "loss, nats per token", lambda value: f"{value:.4g}"),
    Curve(
        "validation_loss",
        "loss on held-out documents, nats per token",
        lambda value: f"{value:.4g}",
        smooth=False,
        sparse=True,
    ),
    Curve("tokens_per_second", "tokens per second", quantity),
    Curve("grad_norm", "gradient norm", lambda value: f"{value:.3g}"),
    Curve("lr", "learning rate", lambda value: f"{value:.2g}", smooth=False),
)


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
    """Reads the files of a run and returns the page."""
    run = RunFiles.read(run_dir)
    return fill(
        "page.html.jinja",
        name=run.name,
        outcome=outcome(run),
        figures=figures(run),
        charts=[(curve, _chart(run, curve)) for curve in CURVES if _is_shown(run, curve)],
        balance=balance_section(run.records),
        memory=memory_section(run.memory),
        cards=cards(run),
        changed=changed_settings(run.config),
        config_text=run.config_text,
        is_smooth=len(run.records) >= SMOOTH_FROM,
    )


def _chart(run: RunFiles, curve: Curve) -> Markup | str:
    steps, values = [record["step"] for record in run.records], run.column(curve.key)
    if curve.sparse:
        measured = [(step, value) for step, value in zip(steps, values) if value is not None]
        steps, values = [step for step, _ in measured], [value for _, value in measured]
    return line_chart(curve.title, steps, values, curve.form, curve.smooth)


def _is_shown(run: RunFiles, curve: Curve) -> bool:
    """A curve of every step is shown without values as well; one of a few steps only where there are some."""
    return bool(run.known(curve.key) if curve.sparse else run.records)
