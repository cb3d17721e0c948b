"""Builds the engine that drives a model which has passed through ``parallelize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longctx.catalog import ENGINES
from longctx.config import Config
from longctx.engines.contract import Engine, EngineKind

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from longctx.mesh import Mesh


def engine_of(model: nn.Module, optimizer: Optimizer, config: Config, mesh: Mesh) -> Engine:
    """Builds the engine that the configuration names; ``optimizer`` holds the parameters of ``model``."""
    kind: EngineKind = ENGINES.load(config.engine.name)
    return kind.drive(model, optimizer, config, mesh)


def _drive(model: nn.Module, optimizer: Optimizer, config: Config, mesh: Mesh) -> Engine:
    # Imported here: the declaration below is read with the configuration.
    from longctx.engines.native import NativeEngine
    from longctx.engines.pipeline import PipelineEngine
    from longctx.parallel.pipeline import Pipeline

    if isinstance(model, Pipeline):
        return PipelineEngine(model, optimizer, mesh, config.parallel.pp_schedule, config.train.dtype)
    return NativeEngine(model, optimizer)


NATIVE = EngineKind("native", _drive)
