"""Engines own a step's forward, backward and update: PyTorch alone, or a framework that the user picks."""

from longctx.engines.choose import engine_of
from longctx.engines.contract import Engine
from longctx.engines.native import NativeEngine
from longctx.engines.pipeline import PipelineEngine

__all__ = ["Engine", "NativeEngine", "PipelineEngine", "engine_of"]
