"""Counts the peak of live tensor bytes from what operators return, without asking an allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.attention.runtime.operands import tensors_in


class PeakMemory(TorchDispatchMode):
    """Counts storages that are made under it, at their full size, until they are freed.

    ``implementations``: operators to look inside, with the function that each runs.
    """

    def __init__(self, implementations: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._implementations = implementations
        self._inputs: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = self._implementations.get(func)
        if inside is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:
                result = inside(*args, **(kwargs or {}))
        for tensor in tensors_in(args, kwargs):
            self._take_as_given(tensor.untyped_storage())
        for tensor in tensors_in(result):
            self._notice(tensor.untyped_storage())
        return result

    def _take_as_given(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._inputs:
            # Forgotten when it dies: another storage may get its address.
            self._inputs[key] = weakref.ref(storage, lambda _: self._inputs.pop(key))

    def _notice(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._inputs:
            return

        def died(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, died)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
