"""The one table of what operators take by name: a plan, or a run that is under way.

An operator's arguments are tensors and plain values. A handle is an int64 scalar on the CPU: reading it waits for no
device, pipeline stages can receive it, autograd keeps it, and ``torch.compile`` does not specialize on its value.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_numbers = itertools.count()
_named: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # each lives as long as its owner
_under_way: dict[int, Any] = {}  # each lives from ``begin`` to ``end``
_shared: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()


def new_handle() -> Tensor:
    """A handle that names nothing yet."""
    return torch.tensor(next(_numbers), dtype=torch.int64, device="cpu")


def name(thing: object) -> Tensor:
    """A handle of what somebody else keeps alive."""
    handle = new_handle()
    _named[int(handle)] = thing
    return handle


def named(handle: Tensor) -> Any:
    """What ``name`` gave the handle; None once it is gone."""
    return _named.get(int(handle))


def begin(handle: Tensor, run: object) -> None:
    """Keeps a run under its handle until it ends. A run of its backward pass may take the handle again."""
    assert int(handle) not in _under_way, f"run {int(handle)} is still under way"
    _under_way[int(handle)] = run


def running(handle: Tensor) -> Any:
    """The run that has begun under the handle."""
    return _under_way[int(handle)]


def end(handle: Tensor) -> Any:
    """Likewise, and lets it go."""
    return _under_way.pop(int(handle))


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` makes, or what it made before for an equal key, as long as anybody holds that."""
    found: T | None = _shared.get(key)
    if found is None:
        found = _shared[key] = make()
    return found
