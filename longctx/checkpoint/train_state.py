"""Defines what a checkpoint holds of a run, and what is written beside it to tell runs apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from longctx.checkpoint.config_record import recorded_config
from longctx.checkpoint.manifest import plain
from longctx.checkpoint.rng import rng_state
from longctx.checkpoint.state import live_tensors


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
class StateAtRest:
    """Holds what a run is between two of its steps, as it can be saved while the later one runs already.

    ``live``: the model's tensors, which a running step only reads. Taken from the model itself in a step they might be
    gathered ones. ``scheduler``, ``loader``: their plain values, None without one. ``rng``: the generators' states.
    """

    live: Mapping[str, Tensor]
    optimizer: Optimizer
    scheduler: Any
    loader: Any
    rng: Mapping[str, Tensor]
    step: int

    @classmethod
    def of(cls, state: TrainState, live: Mapping[str, Tensor] | None = None) -> StateAtRest:
        """Takes the state between two steps; ``live``: the tensors where they were listed before."""
        return cls(
            live=live_tensors(state.model) if live is None else live,
            optimizer=state.optimizer,
            scheduler=None if state.scheduler is None else state.scheduler.state_dict(),
            loader=None if state.loader is None else state.loader.state_dict(),
            rng=rng_state(),
            step=state.step,
        )


@dataclass(frozen=True)
class RunRecord:
    """Tells runs apart: ``layout`` by which ranks draw which random numbers, ``config`` by what was asked for."""

    layout: Any
    config: Any

    @classmethod
    def of(cls, layout: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> RunRecord:
        """Builds the record from plain sections; what only says where a run lies is left out."""
        return cls(plain(layout or {}, "layout"), recorded_config(config or {}))
