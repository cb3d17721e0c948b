"""Former home of ``longctx.checkpoint``: the name stays for scripts that import it."""

from longctx.checkpoint.checkpointer import Checkpointer, TrainState

__all__ = ["Checkpointer", "TrainState"]
