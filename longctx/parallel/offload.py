"""Blocks that keep, for their recompute, their input and whatever is kept by name in host memory.

It comes back one block ahead of the backward pass. Outputs of collectives stay on the device: they are written
after the operator has returned.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from longctx.model import Decoder
from longctx.parallel.host_memory import HostMemory, Stay, host_memory
from longctx.parallel.recompute import COLLECTIVES_NAMESPACE, checkpointed, keeps


def offload_activations(model: Decoder, kept: tuple[str, ...]) -> None:
    """Takes the place of ``recompute_activations``; ``kept``: names of ``recompute.KINDS``."""
    memory = host_memory(model, next(model.parameters()).device)
    blocks = list(model.layers)
    for block in blocks:
        last = block is blocks[-1]
        block.forward = OffloadedBlock(block.forward, kept, memory, last)  # type: ignore[method-assign, assignment]


class OffloadedBlock:
    """``forward`` of a block, recomputed in the backward pass from what waits in ``memory``."""

    def __init__(self, forward: Callable[..., Tensor], kept: tuple[str, ...], memory: HostMemory, last: bool) -> None:
        self._forward, self._kept, self._memory, self._last = forward, kept, memory, last

    def __call__(self, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(*inputs)
        stay = self._memory.enter_block()
        pack, unpack = partial(self._memory.pack, stay), self._memory.unpack
        run = checkpointed(self._forward, partial(self._contexts, stay))
        # Of the checkpoint these see its inputs alone; what is saved inside goes to the checkpoint's own hooks.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = run(*inputs)
        if self._last:
            self._memory.leave_last_block()
        return out

    def _contexts(self, stay: Stay) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        store: Store = defaultdict(deque)
        keeping = Keeping(self._kept, store, partial(self._memory.pack, stay))
        return keeping, Returning(self._kept, store, self._memory.unpack)


Store = dict[Any, deque[Any]]  # results of each operator, in the order of its calls


class Keeping(TorchDispatchMode):
    """The forward pass: packs what operators returned that ``keeps`` names.

    torch's own contexts hold such results themselves, where no hook for saved tensors sees them.
    """

    def __init__(self, kept: tuple[str, ...], store: Store, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._kept, self._store, self._pack = kept, store, pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _distributed(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if keeps(self._kept, func) and not _fake(types):
            stays = func.namespace == COLLECTIVES_NAMESPACE
            self._store[func].append(tree_map(_detached if stays else self._packed, result))
        return result

    def _packed(self, leaf: Any) -> Any:
        return self._pack(leaf.detach()) if isinstance(leaf, Tensor) else leaf


class Returning(TorchDispatchMode):
    """The recompute: gives back what ``Keeping`` packed in place of running the operator."""

    def __init__(self, kept: tuple[str, ...], store: Store, unpack: Callable[[Any], Any]) -> None:
        super().__init__()
        self._kept, self._store, self._unpack = kept, store, unpack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _distributed(types):
            return NotImplemented
        if keeps(self._kept, func) and not _fake(types):
            return tree_map(self._unpack, self._store[func].popleft())
        return func(*args, **(kwargs or {}))


def _distributed(types: Any) -> bool:
    """DTensors take apart what they are asked, and the mode sees the parts."""
    return any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types)


def _fake(types: Any) -> bool:
    """What DTensors ask once to learn of shapes is not part of the block's work."""
    return any(issubclass(kind, FakeTensor) for kind in types)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
