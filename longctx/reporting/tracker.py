"""Sends a run to wandb, where it is installed: a view of the run, never its record, and no way for secrets to leave.

Its own console capture, git remote, command line and machine data stay off: they may hold credentials.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

from longctx.config import Config
from longctx.errors import NotAvailableError

_log = logging.getLogger(__name__)

_PASSWORD_IN_URL = re.compile(r"(\w+://)[^/@\s]+@")
_LOGIN_SECONDS = 30.0  # for wandb=online on a machine without network


def require_tracker(mode: str) -> None:
    """Raises ``NotAvailableError`` when ``logger.wandb`` asks for what is not installed."""
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise NotAvailableError(
            f"logger.wandb={mode} needs wandb, which is not installed: pip install 'longctx[track]'; "
            "valid without it: logger.wandb=disabled"
        )


def open_tracker(config: Config, run_dir: Path) -> Tracker | None:
    """Opens the wandb run below ``run_dir``; None when it is disabled."""
    return None if config.logger.wandb == "disabled" else Tracker(config, run_dir)


class Tracker:
    """Writes one wandb run. After a resume a further one begins, in the same group."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._wandb = wandb
        name = config.run.name or run_dir.resolve().name
        settings = wandb.Settings(
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
        self._run = wandb.init(
            project=config.logger.project,
            name=redacted(name),
            group=redacted(name),
            dir=str(run_dir),
            mode="online" if config.logger.wandb == "online" else "offline",
            config=redacted(config.to_dict()),
            settings=settings,
        )
        if not Path(self._run.dir).resolve().is_relative_to(run_dir.resolve()):
            _log.warning("wandb could not write to %s and writes to %s", run_dir, self._run.dir)

    def step(self, record: dict[str, Any]) -> None:
        """Logs what is known of a step."""
        known = {key: value for key, value in record.items() if value is not None and key != "step"}
        self._run.log(known, step=record["step"], commit=True)

    def close(self, summary: dict[str, Any]) -> None:
        """Hands in the summary and ends the run."""
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})
        code = int(summary.get("outcome") == "failed")
        self._run.finish(exit_code=code)
        # finish() returns while wandb's own process still writes; this waits for that process to end.
        self._wandb.teardown(code)


def redacted(value: Any) -> Any:
    """Leaves out user names and passwords in the URLs of ``value``."""
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    return _PASSWORD_IN_URL.sub(r"\1", value) if isinstance(value, str) else value
