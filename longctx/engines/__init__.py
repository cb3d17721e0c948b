"""Engines own a step's forward, backward and update: PyTorch alone, or a framework that the user picks.

Their declarations need no torch, so that a configuration is read without it.
"""

from longctx.engines.choose import engine_of
from longctx.engines.contract import Engine

__all__ = ["Engine", "engine_of"]
