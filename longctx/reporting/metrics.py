"""Sends each step's record to ``metrics.jsonl``, the console and wandb, and writes a report at the end.

``metrics.jsonl`` is the store of record: one JSON object per step, written at once. The others are made from
the same records, and none of them may end a run.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from longctx.config import Config
from longctx.reporting.best_loss import BestLoss
from longctx.reporting.ending import ending
from longctx.reporting.metrics_file import KEYS, METRICS, JsonLines, read_records
from longctx.reporting.progress import Progress
from longctx.reporting.report.page import REPORT, write_report
from longctx.reporting.teller import Teller
from longctx.reporting.tracker import Tracker, open_tracker, require_tracker

_log = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """Takes one record per step, and a summary at the end of the run or of what there was of it."""

    def step(self, record: dict[str, Any]) -> None:
        """Takes a record with the keys ``KEYS``; None stands for what cannot be known."""

    def close(self, summary: dict[str, Any]) -> None:
        """Takes the summary; called once, also after a failure."""


def open_sink(
    config: Config,
    run_dir: Path,
    rank: int,
    resume_step: int | None,
    *,
    console: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> MetricsSink:
    """Opens the sinks that ``config.logger`` asks for on rank 0, nothing on other ranks.

    ``resume_step``: steps up to it are kept in ``metrics.jsonl``, later ones will be done again; None starts
    afresh. ``console=False`` leaves out what a person reads. ``facts``: what wandb notes beside the configuration;
    ``command`` of them starts such a run.

    Raises ``NotAvailableError`` on every rank when wandb is asked for and not installed, ``StorageError``
    when ``metrics.jsonl`` cannot be written.
    """
    require_tracker(config.logger.wandb)
    if rank != 0:
        return NullSink()
    run_dir = Path(run_dir)
    record = JsonLines(run_dir / METRICS, resume_step or 0)
    followers: dict[str, MetricsSink] = {}
    if console and config.logger.progress:
        followers["progress"] = Progress(config.train.steps)
    with _reported("wandb"):
        tracker = open_tracker(config, run_dir, resume_step, facts or {})
        if tracker is not None:
            followers["wandb"] = tracker
    teller = Teller(silent=not (console and config.logger.progress))
    ended = Ended(config, run_dir, teller, (facts or {}).get("command", "longctx train"))
    return Fanout(record, followers, ended)


class NullSink:
    """Drops every record, on ranks other than 0."""

    def step(self, record: dict[str, Any]) -> None:
        """Drops the record."""

    def close(self, summary: dict[str, Any]) -> None:
        """Closes nothing."""


class Ended:
    """Does what is left when all is recorded: writes the report, and tells how the run ended."""

    def __init__(self, config: Config, run_dir: Path, teller: Teller, command: str) -> None:
        self._config, self._run_dir, self._teller, self._command = config, run_dir, teller, command

    def __call__(self, summary: dict[str, Any], tracker: MetricsSink | None) -> None:
        """``tracker``: None where wandb is not used, or has failed."""
        views = {}
        if self._config.logger.report:
            with _reported(REPORT):
                views["report"] = str(write_report(self._run_dir))
        if isinstance(tracker, Tracker):
            views["wandb"] = f"run {tracker.id}"
            if self._config.logger.wandb == "offline":
                views["wandb"] += f", to upload: wandb sync {shlex.quote(str(self._run_dir / 'wandb' / 'latest-run'))}"
        losses = BestLoss()
        for record in read_records(self._run_dir / METRICS):
            losses.take(record)
        self._teller.say(ending(self._run_dir, self._config.train.steps, summary, losses, views, self._command))


class Fanout:
    """Hands each record to the store of record first, then to sinks that may fail, by name."""

    def __init__(
        self,
        record: JsonLines,
        followers: dict[str, MetricsSink],
        ended: Callable[[dict[str, Any], MetricsSink | None], None],
    ) -> None:
        self._record = record
        self._followers = followers
        self._ended = ended

    def step(self, record: dict[str, Any]) -> None:
        """Records a step, then tells the others."""
        assert set(record) == set(KEYS), f"keys {sorted(set(record) ^ set(KEYS))}"
        self._record.step(record)
        self._each(lambda follower: follower.step(record))

    def close(self, summary: dict[str, Any]) -> None:
        """Closes all of them, writes the report, and tells how the run ended."""
        try:
            self._record.close(summary)
        finally:
            self._each(lambda follower: follower.close(summary))
            with _reported("the last words"):
                self._ended(summary, self._followers.get("wandb"))

    def _each(self, call: Callable[[MetricsSink], None]) -> None:
        for name, follower in list(self._followers.items()):
            try:
                call(follower)
            except Exception as error:
                del self._followers[name]
                _log.warning("%s: %s; it is left out from here on", name, error)


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.warning("%s failed and is left out: %s", what, error)
