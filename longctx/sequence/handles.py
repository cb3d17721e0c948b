"""Handles: int64 tensors by which operators name a plan, or a run in flight, in one table.

An operator's arguments are tensors and plain values. A handle is an int64 scalar on the CPU: reading it waits for no
device. Pipeline stages can receive it, autograd keeps it, and ``torch.compile`` does not specialize on its value.

Numbers are drawn from all of int64 rather than counted. So a handle that another process has made, a worker of a data
loader, say, names nothing here. Counted ones would name some plan of this process.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

NO_PLAN = -1  # in place of a plan's handle: what is computed is not cut

_named: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # each lives as long as its owner
_in_flight: dict[int, Any] = {}  # each lives from ``begin`` to ``end``
_shared: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()


def new_handle() -> Tensor:
    """Returns a handle that names nothing yet."""
    with torch.inference_mode(False):  # or autograd could not keep it for a backward pass
        return torch.tensor(secrets.randbits(63), dtype=torch.int64, device="cpu")


def name(thing: object) -> Tensor:
    """Returns a handle of an object that somebody else keeps alive."""
    handle = new_handle()
    _named[int(handle)] = thing
    return handle


def named(handle: Tensor) -> Any:
    """Returns the object that ``name`` gave the handle; None once it is gone."""
    return _named.get(int(handle))


def begin(handle: Tensor, run: object) -> None:
    """Keeps a run under its handle until it ends. A run of its backward pass may take the handle again."""
    assert int(handle) not in _in_flight, f"run {int(handle)} is still under way"
    _in_flight[int(handle)] = run


def running(handle: Tensor) -> Any:
    """Returns the run that has begun under the handle."""
    return _in_flight[int(handle)]


def end(handle: Tensor) -> Any:
    """Returns the run that has begun under the handle, and lets it go."""
    return _in_flight.pop(int(handle))


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """Returns what ``make`` makes, or what it made before for an equal key, as long as anybody holds that."""
    found: T | None = _shared.get(key)
    if found is None:
        found = _shared[key] = make()
    return found
