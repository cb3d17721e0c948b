"""Defines the options of planners; each planner states in its docstring which of these it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from longctx.errors import ConfigError
from longctx.planner.cost import AttentionShape


@dataclass(frozen=True)
class PlannerOptions:
    """What a planner may be given as options.

    ``tolerance``: the most a server may exceed the mean work, as a share of it.
    ``block``: rows that a cut counts by, the kernel's tile.
    ``egress``: the most query rows that one rank sends, in multiples of the least that its home layout allows for the
    worst rank. Above 1.5 longer bands share their keys: ``2 egress - 1`` servers at most, for fewer bytes in all.
    ``chunk``: query rows of a unit that ``min_heap`` deals.
    ``capacity``: tokens that a device may hold under ``zeppelin``, in multiples of the mean.
    ``widths``: the layer's.
    """

    tolerance: float = 0.02
    block: int = 128
    egress: float = 1.5
    chunk: int = 2048
    capacity: float = 1.25
    widths: AttentionShape = field(default_factory=AttentionShape)

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise ConfigError(f"planner tolerance {self.tolerance} must be at least 0; 0.02 is the default")
        if self.block < 1 or self.chunk < 1:
            raise ConfigError(f"planner block {self.block} and chunk {self.chunk} must be at least 1 row")
        if self.capacity < 1:
            raise ConfigError(f"planner capacity {self.capacity} must be at least 1, the mean tokens of a device")
        if self.egress < 1:
            raise ConfigError(f"planner egress {self.egress} must be at least 1, the lower bound itself")
