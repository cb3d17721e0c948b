"""Configures where a run happens, who drives it, and what it tells."""

from __future__ import annotations

import re
from dataclasses import dataclass

from longctx.catalog import ENGINES
from longctx.errors import ConfigError
from longctx.rules import above, at_least, one_of

WANDB_MODES = ("offline", "online", "disabled")
_SLURM_TIME = re.compile(r"(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d")


@dataclass(frozen=True)
class EngineConfig:
    """Says who owns the step: forward, backward and update."""

    name: str = "native"

    def check(self) -> None:
        """Refuses unknown engines."""
        ENGINES.require(self.name)


@dataclass(frozen=True)
class ClusterConfig:
    """Says where the run happens: what launch and submit need to know of the machines."""

    name: str = "local"
    nodes: int = 1
    devices_per_node: int | None = None  # null: as many as the launcher started; of simulated ranks, all
    nics: int = 1  # of a node; above 1, served attention is routed over them as docs/planner.md says
    nic_bandwidth: float = 50e9  # bytes/s of one of them
    link_bandwidth: float = 450e9  # bytes/s from one device of a node to the others
    partition: str | None = None
    account: str | None = None
    time_limit: str = "24:00:00"

    @property
    def devices(self) -> int:
        """Counts the ranks that ``submit`` asks for on each node."""
        return self.devices_per_node or 1

    def check(self) -> None:
        """Refuses an empty cluster and a time limit that Slurm would not read."""
        at_least("cluster.nodes", self.nodes, 1)
        at_least("cluster.devices_per_node", self.devices_per_node, 1)
        at_least("cluster.nics", self.nics, 1)
        for name in ("nic_bandwidth", "link_bandwidth"):
            value, default = getattr(self, name), getattr(ClusterConfig, name)
            above(f"cluster.{name}", value, 0.0)
            if value != default and self.nics == 1:
                raise ConfigError(
                    f"cluster.{name}={value} says when messages are routed over several NICs, and cluster.nics=1; "
                    f"set cluster.nics=8, or leave cluster.{name} at {default}"
                )
        if not _SLURM_TIME.fullmatch(self.time_limit):
            raise ConfigError(
                f"cluster.time_limit={self.time_limit} must read [days-]hours:minutes:seconds, "
                "for example 24:00:00 or 2-12:00:00"
            )


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
