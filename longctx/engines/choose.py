"""Which engine drives a model that has passed through ``parallelize``."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from longctx.config import Config
from longctx.engines.contract import Engine
from longctx.engines.native import NativeEngine
from longctx.engines.pipeline import PipelineEngine
from longctx.mesh import Mesh
from longctx.parallel.pipeline import Pipeline


def engine_of(model: nn.Module, optimizer: Optimizer, config: Config, mesh: Mesh) -> Engine:
    """``optimizer`` holds the parameters of ``model``."""
    if isinstance(model, Pipeline):
        return PipelineEngine(model, optimizer, mesh, config.parallel.pp_schedule, config.train.dtype)
    return NativeEngine(model, optimizer)
