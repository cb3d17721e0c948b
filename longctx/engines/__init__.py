"""Who owns a step's forward, backward and update: PyTorch alone, or a framework that the user picks."""

from longctx.engines.contract import Engine
from longctx.engines.native import NativeEngine

__all__ = ["Engine", "NativeEngine"]
