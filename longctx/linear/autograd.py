"""Enables autograd inside custom operators, whose backward passes differentiate local computing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

KEYS = ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView")


@contextmanager
def autograd() -> Iterator[None]:
    """Enables autograd inside a custom operator, where torch records nothing by itself; checked with torch 2.13."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
