"""Calls wandb, and lets no secret into it.

Its own console capture, git remote, command line and machine data stay off: they may hold credentials.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longctx.config import Config
from longctx.rules import redacted

_log = logging.getLogger(__name__)

_LOGIN_SECONDS = 30.0  # for wandb=online on a machine without network
_FORGET_SECONDS = 2.0
_SERVICE = "wandb-core"  # its own process, which writes its files


class WandbRun:
    """Writes the rows of one process into the wandb run ``run_id``.

    ``facts``: noted beside the run's configuration; ``parameters`` of them is in the summary as well.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str, facts: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._facts = facts
        logger, online = config.logger, config.logger.wandb == "online"
        self._run = wandb.init(
            id=run_id,
            resume="allow" if online else None,
            allow_val_change=True,  # of the configuration: a resume may have more steps
            project=logger.project,
            entity=logger.entity,
            name=without_logins(config.run.name or run_dir.resolve().name),
            group=without_logins(logger.group),
            tags=without_logins(logger.tags),
            notes=without_logins(logger.notes),
            dir=str(run_dir),
            mode="online" if online else "offline",
            config=without_logins({**config.to_dict(), "facts": dict(facts)}),
            settings=_settings(wandb),
        )
        # A server knows the rows that an earlier process has sent, and takes none of them again.
        self._known = self._run.step if online and self._run.resumed else 0
        if not Path(self._run.dir).resolve().is_relative_to(run_dir.resolve()):
            _log.warning("wandb could not write to %s and writes to %s", run_dir, self._run.dir)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Writes the row of a step."""
        if step >= self._known:
            self._run.log(row, step=step, commit=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Hands in the summary, and ends the run and wandb's own process."""
        known = {**summary, "parameters": self._facts.get("parameters")}
        self._run.summary.update({key: value for key, value in known.items() if value is not None})
        code = int(summary.get("outcome") == "failed")
        self._run.finish(exit_code=code)
        # finish() returns while wandb's own process still writes; this waits for that process to end.
        self._wandb.teardown(code)


def _settings(wandb: Any) -> Any:
    return wandb.Settings(
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        silent=True,
        init_timeout=_LOGIN_SECONDS,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


def stop_service() -> None:
    """Ends wandb's own process, which this one would wait for at its end, and tells wandb's library that it is gone."""
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            for child in map(int, task.read_text().split()):
                if Path(f"/proc/{child}/comm").read_text().strip() == _SERVICE:
                    os.kill(child, signal.SIGKILL)

    def forget() -> None:
        import wandb

        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown(1)

    forgetting = threading.Thread(target=forget, name="wandb-end", daemon=True)
    forgetting.start()
    forgetting.join(_FORGET_SECONDS)


def without_logins(value: Any) -> Any:
    """Leaves out names and passwords in the URLs of ``value``, however deep they are."""
    if isinstance(value, dict):
        return {key: without_logins(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_logins(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value
