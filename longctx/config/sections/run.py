"""Configures where a run lives, who drives it, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.catalog import ENGINES
from longctx.rules import one_of

WANDB_MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class EngineConfig:
    """Says who owns the step: forward, backward and update."""

    name: str = "native"

    def check(self) -> None:
        """Refuses unknown engines."""
        ENGINES.require(self.name)


@dataclass(frozen=True)
class LoggerConfig:
    """Says what a run tells, and to whom."""

    progress: bool = True
    wandb: str = "offline"  # offline, online or disabled
    project: str = "longctx"
    report: bool = True
    memory: bool | None = None  # bytes by category of one step, in memory.json; null: unless train.compile

    def check(self) -> None:
        """Refuses unknown wandb modes."""
        one_of("logger.wandb", self.wandb, WANDB_MODES)


@dataclass(frozen=True)
class RunConfig:
    """Says where a run lives and what it is called."""

    dir: str | None = None  # None: runs/<date>-<time>, chosen once for all ranks
    name: str | None = None

    def check(self) -> None:
        """Refuses nothing: every name and folder will do."""
