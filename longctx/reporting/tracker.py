"""Sends a run to wandb, where it is installed: a view of the run, never its record.

A thread of its own does all that wandb does, so that training waits for none of it.

wandb writes a folder for each process, and the file of a killed one lacks its last rows, or all. A run that is resumed
keeps its id, and its new folder begins with all steps that ``metrics.jsonl`` holds. So the newest folder is the run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from longctx.config import Config
from longctx.errors import NotAvailableError
from longctx.reporting.best_loss import BestLoss
from longctx.reporting.metrics_file import METRICS, read_records
from longctx.reporting.wandb_run import WandbRun, stop_service

_log = logging.getLogger(__name__)

IDENTITY = "wandb.json"
_MOST_WAITING = 100_000  # rows, when wandb takes none
_BEGIN_SECONDS = 10.0
_END_SECONDS = 20.0  # for its last rows, when a run ends; in wandb=online they go over the network


def require_tracker(mode: str) -> None:
    """Raises ``NotAvailableError`` when ``logger.wandb`` asks for what is not installed."""
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise NotAvailableError(
            f"logger.wandb={mode} needs wandb, which is not installed: pip install 'longctx[track]'; "
            "valid without it: logger.wandb=disabled"
        )


@dataclass(frozen=True)
class Identity:
    """Names the wandb run of a run's directory. ``complete``: up to this step its newest folder has every row."""

    id: str
    complete: int = 0

    @classmethod
    def read(cls, run_dir: Path) -> Identity:
        """Reads what an earlier process left in ``run_dir``; a new identity where there is none."""
        try:
            found = json.loads((run_dir / IDENTITY).read_text(encoding="utf-8"))
            known, complete = found["id"], found["complete"]
        except (OSError, ValueError, LookupError, TypeError):
            return cls.new()
        sound = type(known) is str and known.isalnum() and len(known) <= 64 and type(complete) is int
        return cls(known, complete) if sound else cls.new()

    @classmethod
    def new(cls) -> Identity:
        """Draws an identity."""
        return cls(secrets.token_hex(4))

    def write(self, run_dir: Path) -> None:
        """Writes it into ``run_dir``."""
        unfinished = run_dir / f".{IDENTITY}.new"
        unfinished.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        unfinished.replace(run_dir / IDENTITY)


def open_tracker(config: Config, run_dir: Path, resume_step: int | None, facts: Mapping[str, Any]) -> Tracker | None:
    """Opens the wandb run of ``run_dir``; None when it is disabled, or when all steps are done and it has them.

    ``resume_step``: steps that ``metrics.jsonl`` holds already; None starts a run. ``facts``: noted beside its
    configuration.
    """
    if config.logger.wandb == "disabled":
        return None
    identity = Identity.new() if resume_step is None else Identity.read(run_dir)
    done = resume_step or 0
    if done >= config.train.steps and identity.complete >= done > 0:
        return None
    replace(identity, complete=0).write(run_dir)  # until the new folder has every row

    def earlier() -> Iterator[dict[str, Any]]:
        return takewhile(lambda record: record["step"] <= done, read_records(run_dir / METRICS))

    return Tracker(identity, run_dir, lambda: WandbRun(config, run_dir, identity.id, facts), earlier)


class Session(Protocol):
    """Takes the rows of one wandb run."""

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Takes the row of a step; those of earlier processes come again."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Takes the summary and returns when all is written."""


class Tracker:
    """Hands each step to wandb; the rows wait in memory while wandb does not take them.

    ``open_session``: called in the tracker's thread. ``earlier``: reads the records of steps that were done before.
    """

    def __init__(
        self,
        identity: Identity,
        run_dir: Path,
        open_session: Callable[[], Session],
        earlier: Callable[[], Iterator[dict[str, Any]]],
    ) -> None:
        self.id = identity.id
        self._run_dir = run_dir
        self._open_session, self._earlier = open_session, earlier
        self._waiting: queue.Queue[tuple[bool, dict[str, Any]]] = queue.Queue(_MOST_WAITING)
        self._failure: Exception | None = None
        self._totals = {"tokens": 0.0, "flops": 0.0}
        self._best = BestLoss()
        self._last = 0
        self._worker = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._opened = threading.Event()
        self._worker.start()
        # Its import would slow down the first steps, which share this process with it.
        self._opened.wait(_BEGIN_SECONDS)
        self._raise_failure()

    def step(self, record: dict[str, Any]) -> None:
        """Hands over a step. Raises what wandb raised at an earlier one."""
        self._hand_over(False, record)

    def close(self, summary: dict[str, Any]) -> None:
        """Hands over the summary and waits for the end of the run, but not for long."""
        self._hand_over(True, summary)
        self._worker.join(_END_SECONDS)
        if self._worker.is_alive():
            # Otherwise this process would wait for that one at its own end.
            stop_service()
            raise TimeoutError(f"it did not take its last rows within {_END_SECONDS:g} s; the next --resume writes all")
        self._raise_failure()
        Identity(self.id, self._last).write(self._run_dir)

    def _hand_over(self, last: bool, content: dict[str, Any]) -> None:
        self._raise_failure()
        try:
            self._waiting.put_nowait((last, content))
        except queue.Full:
            stop_service()
            raise TimeoutError(f"it has not taken {_MOST_WAITING} rows") from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            session = self._open_session()
            self._opened.set()
            for record in self._earlier():
                self._log(session, record)
            while True:
                last, content = self._waiting.get()
                if last:
                    break
                self._log(session, content)
            session.finish(content | self._best.summary())
        except BaseException as error:  # wandb may call sys.exit
            self._failure = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
            self._opened.set()

    def _log(self, session: Session, record: dict[str, Any]) -> None:
        """Logs what a chart can show of a step, and what has come together until then."""
        self._best.take(record)
        row = {key: value for key, value in record.items() if type(value) in (int, float) and key != "step"}
        for key in self._totals:
            self._totals[key] += row.get(key, 0)
            row[f"{key}_total"] = self._totals[key]
        session.log(record["step"], row)
        self._last = record["step"]
