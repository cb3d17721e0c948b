"""Follows every tensor storage of a stretch of work: when it was born and died, how large it was, and in what work.

Counted from what operators take and return, not asked of an allocator, so that it is the same on every device.
An operator's own workspace is not seen. Categories are given afterwards, when it is known what became of each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.attention.runtime.operands import tensors_in


@dataclass
class StorageLife:
    """Tells the life of one storage. ``sizes``: (time, bytes from then on); a time is a number of operators.

    ``tag``: what it is known to be. ``region``: the work that it was born in. ``backward`` and ``recording``:
    was it born in a backward pass, and while a graph was being recorded? ``given``: it was there before.
    """

    sizes: list[tuple[int, int]]
    tag: str | None = None
    region: str | None = None
    backward: bool = False
    recording: bool = False
    given: bool = False
    kept: bool = False
    died: int | None = None

    def bytes_at(self, time: int) -> int:
        """Tells how large the storage was at a time; 0 after its death."""
        if self.died is not None and time > self.died:
            return 0
        return next((size for start, size in reversed(self.sizes) if start <= time), 0)

    def changes(self) -> Iterator[tuple[int, int]]:
        """Lists the storage's changes: (time, how many bytes more than before)."""
        before = 0
        for time, size in self.sizes:
            yield time, size - before
            before = size
        if self.died is not None:
            yield self.died + 1, -before


# Arguments of FSDP2's own operators: what parameters are gathered into, and gradients before they are reduced.
FSDP_TAGS = {"all_gather_copy_in": "gathered", "split_with_sizes_copy": "gathered", "chunk_cat": "gradients"}


class LiveStorages(TorchDispatchMode):
    """Follows all storages on devices of type ``device``.

    ``implementations``: operators to look inside, and what each runs.

    What was there before is known from the first operator that takes it, or from being tagged.
    """

    def __init__(self, device: str, implementations: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.device = device
        self.implementations = implementations
        self.time = 0
        self.lives: list[StorageLife] = []
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], StorageLife]] = {}
        self._watched: dict[int, tuple[weakref.ref[torch.UntypedStorage], StorageLife]] = {}
        self._region: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they take the operator apart, and the parts come here
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)
        self.time += 1
        self._notice_resized()
        given = tensors_in(args, kwargs)
        for tensor in given:
            self._notice(tensor, given=True)
        if func.namespace == "fsdp":
            for tensor in given:
                self.tag(tensor, FSDP_TAGS.get(func.__name__.split(".")[0], "gathered"))
        inside = self.implementations.get(func)
        if inside is None:
            result = func(*args, **kwargs)
        else:
            with self.region("attention"), self:
                result = inside(*args, **kwargs)
        for tensor in tensors_in(result):
            self._notice(tensor)
        return result

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Notes storages that are born inside as born in ``name``."""
        before, self._region = self._region, name
        try:
            yield
        finally:
            self._region = before

    def tag(self, tensor: Tensor, name: str) -> None:
        """Says what ``tensor`` is, from its storage's birth on."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        life = self._notice(tensor, given=True)
        if life is not None and life.tag is None:
            life.tag = name
            if name != "gathered":
                self._watched.pop(tensor.untyped_storage()._cdata, None)

    def keep(self) -> None:
        """Notes that what forward has made and is alive now is kept for the backward pass."""
        for _, life in list(self._alive.values()):
            life.kept = life.kept or not (life.backward or life.given)

    def peak(self) -> tuple[int, int]:
        """Finds the first time at which most bytes were alive, and how many."""
        changes = [0] * (self.time + 2)
        for life in self.lives:
            for time, change in life.changes():
                changes[time] += change
        totals = list(accumulate(changes))
        most = max(totals)
        return totals.index(most), most

    def _notice(self, tensor: Tensor, given: bool = False) -> StorageLife | None:
        if isinstance(tensor, FakeTensor | DTensor | AsyncCollectiveTensor) or tensor.device.type != self.device:
            return None
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is not None:
            self._resize(known[1], size)
            return known[1]
        backward = torch._C._current_graph_task_id() != -1
        life = StorageLife([(self.time, size)], None, self._region, backward, torch.is_grad_enabled(), given)
        self.lives.append(life)

        def died(_: weakref.ref[torch.UntypedStorage]) -> None:
            life.died = self.time
            self._alive.pop(key)
            self._watched.pop(key, None)

        self._alive[key] = (weakref.ref(storage, died), life)
        if given:
            # FSDP2 resizes the storages of gathered parameters, which no operator tells of.
            self._watched[key] = self._alive[key]
        return life

    def _notice_resized(self) -> None:
        for reference, life in list(self._watched.values()):
            storage = reference()
            if storage is not None:
                self._resize(life, storage.nbytes())

    def _resize(self, life: StorageLife, size: int) -> None:
        if size != life.sizes[-1][1]:
            life.sizes.append((self.time, size))
