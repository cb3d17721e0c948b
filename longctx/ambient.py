"""Ambient modes of torch, kept out of what operators compute and of what plans remember.

Autocast, a default device and inference mode are settings of a thread. An operator computes what its definition says,
in the dtypes and on the device of its inputs, whatever the caller has set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_Key = torch._C.DispatchKey
_AUTOCAST = torch._C.DispatchKeySet(_Key.AutocastCPU)
for _name in ("AutocastCUDA", "AutocastXPU", "AutocastMPS", "AutocastPrivateUse1"):
    if hasattr(_Key, _name):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(getattr(_Key, _name))


def apart(run: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that runs without autocast, default device and any other mode of torch functions."""
    guard, plain, without = torch._C._ExcludeDispatchKeyGuard, torch._C.DisableTorchFunction, _AUTOCAST

    @wraps(run)
    def of(*arguments: P.args, **named: P.kwargs) -> T:
        with guard(without), plain():
            return run(*arguments, **named)

    return of


def lasting(make: Callable[P, T]) -> Callable[P, T]:
    """Makes a function whose tensors outlive the mode that it is called in.

    What is kept for later must be no tensor of inference mode, which autograd would refuse to save.
    """

    @wraps(make)
    def of(*arguments: P.args, **named: P.kwargs) -> T:
        with torch.inference_mode(False), torch._C.DisableTorchFunction():
            return make(*arguments, **named)

    return of
