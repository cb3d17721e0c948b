"""Keeps the former name of ``longctx.checkpoint``, for scripts that import it."""

from longctx.checkpoint.checkpointer import Checkpointer, TrainState

__all__ = ["Checkpointer", "TrainState"]
