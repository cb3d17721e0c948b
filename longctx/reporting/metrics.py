"""Sends each step's record to ``metrics.jsonl``, the console and wandb, and writes a report at the end.

``metrics.jsonl`` is the store of record: one JSON object per step, flushed at once. The others are made from
the same records, and none of them may end a run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from longctx.config import Config
from longctx.reporting.metrics_file import KEYS, METRICS, JsonLines
from longctx.reporting.progress import Progress
from longctx.reporting.report.page import write_report
from longctx.reporting.tracker import open_tracker, require_tracker

_log = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """Takes one record per step, and a summary at the end of the run or of what there was of it."""

    def step(self, record: dict[str, Any]) -> None:
        """Takes a record with the keys ``KEYS``; None stands for what cannot be known."""

    def close(self, summary: dict[str, Any]) -> None:
        """Takes the summary; called once, also after a failure."""


def open_sink(
    config: Config, run_dir: Path, rank: int, resume_step: int | None, *, console: bool = True
) -> MetricsSink:
    """Opens the sinks that ``config.logger`` asks for on rank 0, nothing on other ranks.

    ``resume_step``: steps up to it are kept in ``metrics.jsonl``, later ones will be done again; None starts
    afresh. ``console=False`` leaves the progress line out.

    Raises ``NotAvailableError`` on every rank when wandb is asked for and not installed, ``StorageError``
    when ``metrics.jsonl`` cannot be written.
    """
    require_tracker(config.logger.wandb)
    if rank != 0:
        return NullSink()
    run_dir = Path(run_dir)
    record = JsonLines(run_dir / METRICS, resume_step or 0)
    followers: list[MetricsSink] = []
    if console and config.logger.progress:
        followers.append(Progress(config.train.steps))
    with _reported("wandb"):
        tracker = open_tracker(config, run_dir)
        followers += [tracker] if tracker else []
    report = (lambda: write_report(run_dir)) if config.logger.report else None
    return Fanout(record, followers, report)


class NullSink:
    """Drops every record, on ranks other than 0."""

    def step(self, record: dict[str, Any]) -> None:
        """Drops the record."""

    def close(self, summary: dict[str, Any]) -> None:
        """Closes nothing."""


class Fanout:
    """Hands each record to the store of record first, then to sinks that may fail."""

    def __init__(self, record: JsonLines, followers: list[MetricsSink], report: Callable[[], Path] | None) -> None:
        self._record = record
        self._followers = followers
        self._report = report

    def step(self, record: dict[str, Any]) -> None:
        """Records a step, then tells the others."""
        assert tuple(record) == KEYS or set(record) == set(KEYS), f"keys {sorted(set(record) ^ set(KEYS))}"
        self._record.step(record)
        self._each(lambda follower: follower.step(record))

    def close(self, summary: dict[str, Any]) -> None:
        """Closes all of them, and writes the report when the record is complete."""
        try:
            self._record.close(summary)
        finally:
            self._each(lambda follower: follower.close(summary))
            if self._report is not None:
                with _reported("report.html"):
                    self._report()

    def _each(self, call: Callable[[MetricsSink], None]) -> None:
        for follower in list(self._followers):
            try:
                call(follower)
            except Exception as error:
                self._followers.remove(follower)
                _log.warning("%s: %s; it is left out from here on", type(follower).__name__, error)


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.warning("%s failed and is left out: %s", what, error)
