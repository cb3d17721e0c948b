"""Configures the mesh, and what carries messages between its ranks."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.config.pipeline import virtual_stages
from longctx.errors import ConfigError
from longctx.rules import at_least, one_of, within

BACKENDS = ("nccl", "gloo", "sim")
# Process groups count whole milliseconds, and add them to a clock that counts nanoseconds in 64 bits.
TIMEOUT_SECONDS = (0.001, 1e9)


@dataclass(frozen=True)
class ParallelConfig:
    """Sets the degrees of the mesh; their product is the world size. -1 in dp_shard: what is left."""

    dp_replicate: int = 1
    dp_shard: int = -1
    sp: int = 1
    tp: int = 1
    pp: int = 1
    pp_schedule: str = "1f1b"  # gpipe, 1f1b, interleaved_1f1b, zbv or dualpipev
    pp_virtual: int | None = None  # stages per pipeline rank; None: what the schedule needs

    @property
    def stages(self) -> int:
        """Counts the stages of the whole pipeline; 1 without one."""
        return 1 if self.pp == 1 else self.pp * virtual_stages(self.pp_schedule, self.pp_virtual)

    def check(self) -> None:
        """Refuses degrees that are no degrees, and stages that the schedule does not have."""
        for name in ("dp_replicate", "sp", "tp", "pp"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ConfigError(f"parallel.dp_shard={self.dp_shard} must be at least 1, or -1 for what the others leave")
        virtual_stages(self.pp_schedule, self.pp_virtual)


@dataclass(frozen=True)
class CommConfig:
    """Says what carries messages between ranks."""

    backend: str = "gloo"  # nccl, gloo or sim
    timeout_seconds: float = 120.0
    shuffle_seed: int | None = None  # sim only: order in which ranks take turns

    def check(self) -> None:
        """Refuses unknown backends and a hand-over order where nothing is handed over."""
        one_of("comm.backend", self.backend, BACKENDS)
        within("comm.timeout_seconds", self.timeout_seconds, *TIMEOUT_SECONDS)
        if self.shuffle_seed is not None and self.backend != "sim":
            raise ConfigError(
                f"comm.shuffle_seed={self.shuffle_seed} needs comm=sim, got comm={self.backend}: "
                "only simulated ranks take turns"
            )
