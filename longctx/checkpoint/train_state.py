"""Defines what a checkpoint holds of a run, and what is written beside it to tell runs apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from longctx.checkpoint.config_record import recorded_config
from longctx.checkpoint.manifest import plain


@dataclass
class TrainState:
    """Holds everything that a run needs to go on.

    ``scheduler`` and ``loader`` have ``state_dict`` and ``load_state_dict`` of plain JSON values, equal on
    all ranks; either may be None.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    loader: Any
    step: int


@dataclass(frozen=True)
class RunRecord:
    """Tells runs apart: ``layout`` by which ranks draw which random numbers, ``config`` by what was asked for."""

    layout: Any
    config: Any

    @classmethod
    def of(cls, layout: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> RunRecord:
        """Builds the record from plain sections; what only says where a run lies is left out."""
        return cls(plain(layout or {}, "layout"), recorded_config(config or {}))
