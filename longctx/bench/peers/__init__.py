"""Other systems' ways to train the same decoder on two processes: what a competent user of them would write.

A peer takes the decoder with its initial weights and returns its step: whole tokens and labels ``[1, S]``, equal on
all ranks, to the mean loss over all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from longctx.bench.peers import torch_context_parallel, ulysses
from longctx.model import Decoder

Step = Callable[[Tensor, Tensor], float]

PEERS: dict[str, Callable[[Decoder, float, int], Step]] = {
    "torch": torch_context_parallel.prepare,
    "ulysses": ulysses.prepare,
}
# What each needs beyond torch, by the name that it is imported by.
PACKAGES = {"torch": None, "ulysses": "deepspeed"}

__all__ = ["PACKAGES", "PEERS", "Step"]
