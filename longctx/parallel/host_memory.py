"""Keeps tensors in host memory between the forward and the backward pass.

On CUDA copies run on a stream of their own, from and to pinned buffers; the host never waits for one:
- A buffer is used again without asking whether its last copy is done, for all copies are on one stream.
- What leaves is held until the compute stream has been made to wait for its copy, at most two blocks later. So its
  memory is used again in an order that the device knows.
- What returns is allocated on the compute stream, and the copies wait for that stream before they write it.

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
    """Host buffers of one model on one device, by size, which are used again over blocks and steps."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []  # all that there are
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._offloaded: dict[int, tuple[weakref.ref[torch.UntypedStorage], weakref.ref[OffloadedStorage]]] = {}
        self._leaving: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        self._block: weakref.ref[BlockOffload] | None = None
        self._entered = 0

    def enter_block(self) -> BlockOffload:
        """Begins a block's forward pass and frees the device memory of what earlier blocks have offloaded.

        Copies of the last ``BLOCKS_LEAVING`` blocks may still be under way.
        """
        self._entered += 1
        self._settle(self._entered - BLOCKS_LEAVING)
        offload = BlockOffload(self._block)
        self._block = weakref.ref(offload)
        return offload

    def leave_last_block(self) -> None:
        """Frees the device memory of all that is offloaded: the loss comes next, which may be the peak."""
        self._settle(self._entered + 1)

    def pack(self, offload: BlockOffload, tensor: Tensor) -> Any:
        """Returns ``tensor``, or a record from which ``unpack`` makes an equal one.

        Parameters, subclasses and small tensors stay, and so do views of less than half of their storage.
        """
        storage = tensor.untyped_storage() if type(tensor) is Tensor else None
        if storage is None or storage.nbytes() < SMALLEST or 2 * tensor.nbytes < storage.nbytes():
            return tensor
        known = self._offloaded.get(storage._cdata)
        offloaded = known[1]() if known is not None and known[0]() is storage else None
        if offloaded is None:
            offloaded = self._send(offload, storage)
        return OffloadedView(offloaded, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        """Returns the tensor that was packed, and starts to bring back those of the block before."""
        if not isinstance(packed, OffloadedView):
            kept: Tensor = packed
            return kept
        packed.storage.offload.prefetch()
        before = packed.storage.offload.before()
        if before is not None:
            before.prefetch()
        return packed.of(packed.storage.fetch())

    def _send(self, offload: BlockOffload, storage: torch.UntypedStorage) -> OffloadedStorage:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer = self._take(source.numel())
        if self.stream is None:
            buffer.copy_(source)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(self.stream):
                buffer.copy_(source, non_blocking=True)
            self._leaving.append((self._entered, source, self.stream.record_event()))
        offloaded = OffloadedStorage(self, offload, buffer, source.device)
        # Not at exit: a stream may be gone by then.
        weakref.finalize(offloaded, _let_go, offloaded.incoming, self._free[buffer.numel()], buffer).atexit = False
        key = storage._cdata
        # Forgotten when it dies: another storage may get its address.
        self._offloaded[key] = (
            weakref.ref(storage, lambda _: self._offloaded.pop(key, None)),
            weakref.ref(offloaded),
        )
        offload.storages.append(weakref.ref(offloaded))
        return offloaded

    def _take(self, size: int) -> Tensor:
        if self._free[size]:
            return self._free[size].pop()
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        self.buffers.append(buffer)
        return buffer

    def _settle(self, block: int) -> None:
        """Frees what blocks before ``block`` have offloaded, after its copies in the compute stream's order."""
        while self._leaving and self._leaving[0][0] < block:
            _, source, copied = self._leaving.popleft()
            torch.cuda.current_stream(source.device).wait_event(copied)


class BlockOffload:
    """What one run of one block has offloaded; it lives as long as any of it."""

    def __init__(self, before: weakref.ref[BlockOffload] | None) -> None:
        self.storages: list[weakref.ref[OffloadedStorage]] = []
        self._before = before

    def before(self) -> BlockOffload | None:
        """Returns the record of the block that ran before, whose backward pass comes next."""
        return self._before() if self._before is not None else None

    def prefetch(self) -> None:
        """Starts all copies back that have not been started yet."""
        for reference in self.storages:
            offloaded = reference()
            if offloaded is not None:
                offloaded.prefetch()
        self.storages.clear()


class OffloadedStorage:
    """A storage whose bytes lie in ``buffer``; the buffer goes back to its pool with this object."""

    def __init__(self, memory: HostMemory, offload: BlockOffload, buffer: Tensor, device: torch.device) -> None:
        self.offload = offload
        self._memory, self._buffer, self._device = memory, buffer, device
        self.incoming: list[tuple[Tensor, torch.cuda.Event | None]] = []  # one at most

    def prefetch(self) -> None:
        """Starts the copy back to the device, unless it is under way."""
        if self.incoming:
            return
        target = torch.empty_like(self._buffer, device=self._device, pin_memory=False)
        stream = self._memory.stream
        if stream is None:
            target.copy_(self._buffer)
            self.incoming.append((target, None))
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(self._buffer, non_blocking=True)
        self.incoming.append((target, stream.record_event()))

    def fetch(self) -> Tensor:
        """Returns the bytes, after their copy in the compute stream's order; whoever asks again gets another copy."""
        self.prefetch()
        target, copied = self.incoming.pop()
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return target


def _let_go(incoming: list[tuple[Tensor, torch.cuda.Event | None]], free: list[Tensor], buffer: Tensor) -> None:
    """Returns ``buffer`` to its pool once no copy from it is under way.

    A recompute stops once it has all it needs. What came back for the rest may not be used again while it is written.
    """
    for target, copied in incoming:
        if copied is not None:
            torch.cuda.current_stream(target.device).wait_event(copied)
    incoming.clear()
    free.append(buffer)


class OffloadedView:
    """A tensor that views an offloaded storage."""

    def __init__(
        self,
        offloaded: OffloadedStorage,
        dtype: torch.dtype,
        shape: torch.Size,
        stride: tuple[int, ...],
        offset: int,
    ) -> None:
        self.storage = offloaded
        self._layout = (offset, shape, stride)
        self._dtype = dtype

    def of(self, target: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=self._dtype, device=target.device)
        return empty.set_(target.untyped_storage(), *self._layout)


_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, HostMemory] = weakref.WeakKeyDictionary()


def host_memory(model: nn.Module, device: torch.device) -> HostMemory:
    """Returns the host memory of a model whose activations are offloaded, made on the first call."""
    if model not in _OF_MODELS:
        _OF_MODELS[model] = HostMemory(device)
    return _OF_MODELS[model]


def host_buffers(model: nn.Module) -> list[Tensor]:
    """Returns all host buffers of a model, in use or not; none without offload."""
    memory = _OF_MODELS.get(model)
    return memory.buffers if memory is not None else []
