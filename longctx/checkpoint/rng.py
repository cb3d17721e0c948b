"""Saves and restores the state of the random number generators that a rank draws from.

torch's default generators only: longctx draws nothing from ``random`` and ``numpy.random``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """Returns the generators' ``uint8`` states by device type, on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Makes the generators go on where ``state`` was taken. A CUDA state without CUDA is of no use and left out."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
