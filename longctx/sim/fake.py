"""Runs ranks on shapes without numbers: floating tensors are fake, integers stay real.

A plain ``FakeTensorMode`` makes every tensor fake. Then no program with a device mesh gets far: rank maps, positions,
split sizes and masks steer it, so somebody asks for their values. Integers are small and decide what happens;
floating tensors are large and only flow through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Factories that make integers when they are given integers and no dtype.
_INTEGERS_FROM_INTEGERS = (_aten.arange, _aten.full, _aten.scalar_tensor, _aten.randint, _aten.randperm)


class FakeFloats(FakeTensorMode):
    """A fake mode that leaves operators on integers alone."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _concerns_integers_only(func.overloadpacket, args, kwargs):
            with _disable_current_modes():
                return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _concerns_integers_only(operator: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) or tensor.is_floating_point() for tensor in tensors)
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    return operator in _INTEGERS_FROM_INTEGERS and all(isinstance(leaf, int) for leaf in tree_leaves(args))
