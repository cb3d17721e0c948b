"""Offloads what blocks keep for their recompute to host memory: their input, and whatever is kept by name.

It comes back one block ahead of the backward pass. Outputs of collectives stay on the device: they are written
after the operator has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.model import Decoder
from longctx.parallel.host_memory import BlockOffload, HostMemory, host_memory
from longctx.parallel.recompute import checkpointed, own_contexts


def offload_activations(model: Decoder, kept: tuple[str, ...]) -> None:
    """Makes blocks recompute from host memory, in place of ``recompute_activations``.

    ``kept``: names of ``recompute.KINDS``.
    """
    memory = host_memory(model, next(model.parameters()).device)
    blocks = list(model.layers)
    for block in blocks:
        last = block is blocks[-1]
        block.forward = OffloadedBlock(block.forward, kept, memory, last)  # type: ignore[method-assign, assignment]


class OffloadedBlock:
    """A block's ``forward`` that is recomputed in the backward pass from what waits in ``memory``."""

    def __init__(self, forward: Callable[..., Tensor], kept: tuple[str, ...], memory: HostMemory, last: bool) -> None:
        self._forward, self._kept, self._memory, self._last = forward, kept, memory, last

    def __call__(self, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(*inputs)
        offload = self._memory.enter_block()
        pack, unpack = partial(self._memory.pack, offload), self._memory.unpack
        run = checkpointed(self._forward, partial(self._contexts, offload))
        # Of the checkpoint these see its inputs alone; what is saved inside goes to the checkpoint's own hooks.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = run(*inputs)
        if self._last:
            self._memory.leave_last_block()
        return out

    def _contexts(self, offload: BlockOffload) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        return own_contexts(self._kept, partial(self._memory.pack, offload), self._memory.unpack)
