"""Configures where a run lives, who drives it, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.catalog import ENGINES
from longctx.errors import ConfigError
from longctx.rules import one_of

WANDB_MODES = ("offline", "online", "disabled")
_NOT_IN_PROJECTS = "/\\#?%:"  # wandb takes none of these in a project's name
_LONGEST_PROJECT, _LONGEST_TAG = 128, 64  # characters, of wandb too


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
    project: str = "longctx"  # of wandb, as are the next four
    entity: str | None = None  # user or team; null: whoever syncs or is logged in
    group: str | None = None  # runs that belong together
    tags: tuple[str, ...] = ()
    notes: str | None = None
    report: bool = True
    memory: bool | None = None  # bytes by category of one step, in memory.json; null: unless train.compile

    def check(self) -> None:
        """Refuses unknown wandb modes, and names that wandb would not take hours later."""
        one_of("logger.wandb", self.wandb, WANDB_MODES)
        fine = "".join(letter for letter in self.project if letter not in _NOT_IN_PROJECTS)[:_LONGEST_PROJECT]
        if fine != self.project:
            raise ConfigError(
                f"logger.project={self.project} must have at most {_LONGEST_PROJECT} characters and none of "
                f"{' '.join(_NOT_IN_PROJECTS)}; nearest valid value: {fine or LoggerConfig.project}"
            )
        for tag in self.tags:
            if len(tag) > _LONGEST_TAG:
                raise ConfigError(
                    f"logger.tags: {tag} has {len(tag)} characters, and wandb takes {_LONGEST_TAG}; nearest valid "
                    f"value: {tag[:_LONGEST_TAG]}"
                )


@dataclass(frozen=True)
class InitConfig:
    """Says what a new run starts from."""

    from_: str | None = None  # a run's directory, or one of its checkpoints/step-N: take its weights; null: draw them

    def check(self) -> None:
        """Refuses nothing: what lies there is looked at when a run starts."""


@dataclass(frozen=True)
class RunConfig:
    """Says where a run lives and what it is called."""

    dir: str | None = None  # None: runs/<date>-<time>, chosen once for all ranks
    name: str | None = None

    def check(self) -> None:
        """Refuses nothing: every name and folder will do."""
