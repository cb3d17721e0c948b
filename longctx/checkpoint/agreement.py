"""Lets ranks agree on what they do around a checkpoint, by collectives on tensors alone.

torch's object collectives pickle; here JSON bytes travel in ``uint8`` tensors.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from longctx import errors
from longctx.checkpoint.store_channel import StoreChannel
from longctx.errors import LongctxError, StorageError

_thread = threading.local()


@contextlib.contextmanager
def through(channel: StoreChannel) -> Iterator[None]:
    """Lets this thread agree with those of the other ranks through ``channel``, while collectives are not its own."""
    _thread.channel = channel
    try:
        yield
    finally:
        _thread.channel = None


def _channel() -> StoreChannel | None:
    return getattr(_thread, "channel", None)


def this_rank() -> int:
    """Returns the rank in the world; 0 in a lone process without process group."""
    if channel := _channel():
        return channel.rank
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Counts the ranks in the world; 1 in a lone process without process group."""
    if channel := _channel():
        return channel.world
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange(payload: bytes) -> list[bytes]:
    """Gathers every rank's payload, by rank."""
    if channel := _channel():
        return channel.exchange(payload)
    if not dist.is_initialized():
        return [payload]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(size) for size in lengths]
    padded = torch.frombuffer(bytearray(payload.ljust(max(*sizes, 1), b"\0")), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [data[:size].cpu().numpy().tobytes() for data, size in zip(gathered, sizes, strict=True)]


def run_on_all_ranks(action: Callable[[], Any]) -> list[Any]:
    """Runs ``action``, which must not communicate, on every rank; all succeed or all raise.

    Returns what the ranks returned (plain JSON values), by rank. When any rank failed, every rank raises the
    same error, that of the first one: nobody is left waiting in a collective.
    """
    failure: Exception | None = None
    try:
        outcome: dict[str, Any] = {"value": action()}
    except Exception as error:
        failure = error
        own = isinstance(error, LongctxError)
        kind = type(error).__name__ if own else StorageError.__name__
        outcome = {"kind": kind, "message": str(error) if own else f"{type(error).__name__}: {error}"}
    outcomes = [json.loads(data) for data in exchange(json.dumps(outcome).encode())]
    for rank, other in enumerate(outcomes):
        if "kind" in other:
            where = f"rank {rank}: " if len(outcomes) > 1 else ""
            raise getattr(errors, other["kind"])(where + other["message"]) from failure
    return [other["value"] for other in outcomes]
