"""Tensors that wait in host memory between the forward and the backward pass.

On CUDA copies run on a stream of their own, from and to pinned buffers; the host never waits for one:
- a buffer is used again without asking whether its last copy is done, for all copies are on one stream;
- what leaves is held until the compute stream has been told to wait for its copy, one block later at most two,
  so that its memory is used again in an order that the device knows;
- what returns is allocated on the compute stream, and the copies wait for that stream before they write it.

On the CPU the same code copies at once, from host memory to host memory: it saves nothing there.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 512  # bytes; what is smaller stays
BLOCKS_LEAVING = 2  # whose copies may be under way while the next block is run


class HostMemory:
    """Buffers of one model on one device, by size; they are used again over blocks and steps."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []  # all that there are
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._away: dict[int, tuple[weakref.ref[torch.UntypedStorage], weakref.ref[Away]]] = {}
        self._leaving: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        self._block: weakref.ref[Stay] | None = None
        self._entered = 0

    def enter_block(self) -> Stay:
        """A block's forward pass begins: what the one before the last sent away may be used again."""
        self._entered += 1
        self._settle(self._entered - BLOCKS_LEAVING)
        stay = Stay(self._block)
        self._block = weakref.ref(stay)
        return stay

    def leave_last_block(self) -> None:
        """The loss comes next, which may be the peak: nothing that is away keeps its place on the device."""
        self._settle(self._entered + 1)

    def pack(self, stay: Stay, tensor: Tensor) -> Any:
        """``tensor``, or what ``unpack`` makes an equal one of.

        Parameters, subclasses and small tensors stay, and so do views of less than half of their storage.
        """
        storage = tensor.untyped_storage() if type(tensor) is Tensor else None
        if storage is None or storage.nbytes() < SMALLEST or 2 * tensor.nbytes < storage.nbytes():
            return tensor
        known = self._away.get(storage._cdata)
        away = known[1]() if known is not None and known[0]() is storage else None
        if away is None:
            away = self._send(stay, storage)
        return View(away, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, View):
            kept: Tensor = packed
            return kept
        packed.away.stay.begin_return()
        before = packed.away.stay.before()
        if before is not None:
            before.begin_return()
        return packed.of(packed.away.returned())

    def _send(self, stay: Stay, storage: torch.UntypedStorage) -> Away:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer = self._take(source.numel())
        if self.stream is None:
            buffer.copy_(source)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(self.stream):
                buffer.copy_(source, non_blocking=True)
            self._leaving.append((self._entered, source, self.stream.record_event()))
        away = Away(self, stay, buffer, source.device)
        # Not at exit: a stream may be gone by then.
        weakref.finalize(away, _let_go, away.coming, self._free[buffer.numel()], buffer).atexit = False
        key = storage._cdata
        # Forgotten when it dies: another storage may get its address.
        self._away[key] = (weakref.ref(storage, lambda _: self._away.pop(key, None)), weakref.ref(away))
        stay.guests.append(weakref.ref(away))
        return away

    def _take(self, size: int) -> Tensor:
        if self._free[size]:
            return self._free[size].pop()
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        self.buffers.append(buffer)
        return buffer

    def _settle(self, block: int) -> None:
        """What blocks before ``block`` sent away is let go, after its copies in the compute stream's order."""
        while self._leaving and self._leaving[0][0] < block:
            _, source, copied = self._leaving.popleft()
            torch.cuda.current_stream(source.device).wait_event(copied)


class Stay:
    """What one run of one block has sent away. It lives as long as any of it."""

    def __init__(self, before: weakref.ref[Stay] | None) -> None:
        self.guests: list[weakref.ref[Away]] = []
        self._before = before

    def before(self) -> Stay | None:
        """That of the block that ran before, whose backward pass comes next."""
        return self._before() if self._before is not None else None

    def begin_return(self) -> None:
        """Starts all copies that have not been started yet."""
        for guest in self.guests:
            away = guest()
            if away is not None:
                away.begin_return()
        self.guests.clear()


class Away:
    """A storage whose bytes lie in ``buffer``, which goes back to its pool with this."""

    def __init__(self, memory: HostMemory, stay: Stay, buffer: Tensor, device: torch.device) -> None:
        self.stay = stay
        self._memory, self._buffer, self._device = memory, buffer, device
        self.coming: list[tuple[Tensor, torch.cuda.Event | None]] = []  # one at most

    def begin_return(self) -> None:
        if self.coming:
            return
        target = torch.empty_like(self._buffer, device=self._device, pin_memory=False)
        stream = self._memory.stream
        if stream is None:
            target.copy_(self._buffer)
            self.coming.append((target, None))
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(self._buffer, non_blocking=True)
        self.coming.append((target, stream.record_event()))

    def returned(self) -> Tensor:
        """The bytes, after their copy in the compute stream's order; whoever asks again gets another copy."""
        self.begin_return()
        target, copied = self.coming.pop()
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return target


def _let_go(coming: list[tuple[Tensor, torch.cuda.Event | None]], free: list[Tensor], buffer: Tensor) -> None:
    """A recompute stops once it has all it needs; what came back for the rest may not be used again while written."""
    for target, copied in coming:
        if copied is not None:
            torch.cuda.current_stream(target.device).wait_event(copied)
    coming.clear()
    free.append(buffer)


class View:
    """A tensor of a storage that is away."""

    def __init__(self, away: Away, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self.away = away
        self._layout = (offset, shape, stride)
        self._dtype = dtype

    def of(self, target: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=self._dtype, device=target.device)
        return empty.set_(target.untyped_storage(), *self._layout)


_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, HostMemory] = weakref.WeakKeyDictionary()


def host_memory(model: nn.Module, device: torch.device) -> HostMemory:
    """That of a model whose activations are offloaded, made on the first call."""
    if model not in _OF_MODELS:
        _OF_MODELS[model] = HostMemory(device)
    return _OF_MODELS[model]


def host_buffers(model: nn.Module) -> list[Tensor]:
    """All host buffers of a model, in use or not; none without offload."""
    memory = _OF_MODELS.get(model)
    return memory.buffers if memory is not None else []
