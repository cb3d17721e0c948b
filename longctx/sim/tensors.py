"""Moves data between ranks' tensors without leaving marks on autograd."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

# torch's stubs don't list the enum's members.
RedOpType: Any = dist.ReduceOp.RedOpType


_no_modes = contextlib.nullcontext()


def without_dispatch_modes() -> contextlib.AbstractContextManager[object]:
    """Runs data movement outside the calling rank's dispatch modes.

    The last rank to arrive moves the data of all; its flop counter or fake mode must not see that. Autograd
    sees nothing either, since all of this works on detached tensors.
    """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _no_modes


def has_no_data(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns True if any tensor is fake or on the meta device, where only shapes can be checked."""
    return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


def check_contiguous(operation: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raises ValueError for strided tensors, which Gloo and NCCL refuse: what passes here must run there."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}, must be "
                f"contiguous; call .contiguous() first"
            )


def copy_data(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copies the numbers of ``source`` into ``destination``, of as many elements and any layout.

    It goes through ``.data``, as a network card would: autograd's version counter does not move.
    """
    if source.shape != destination.shape:
        source = source.view(destination.shape)
    destination.data.copy_(source)


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of the elements of all tensors."""
    return sum([tensor.nbytes for tensor in tensors])


def shapes(tensors: Iterable[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """Returns the shape of each tensor."""
    return tuple([tuple(tensor.shape) for tensor in tensors])


def dtype_name(tensors: Sequence[torch.Tensor]) -> str:
    """Returns the name of the first tensor's dtype, such as "float32"; "" without tensors."""
    return _dtype_name(tensors[0].dtype) if tensors else ""


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reduce_in_rank_order(tensors: Sequence[torch.Tensor], op: dist.ReduceOp) -> torch.Tensor:
    """Reduces over ranks, strictly in rank order, so that no schedule can change the sum.

    Floating types below fp32 are accumulated in fp32 and rounded once.

    Args:
        tensors: one per rank, of equal shape and dtype.
        op: SUM, AVG, PREMUL_SUM, PRODUCT, MIN, MAX, BAND, BOR or BXOR.

    Returns:
        A new tensor of the inputs' shape and dtype.

    Raises:
        ValueError: AVG or PREMUL_SUM of integers, or a bitwise operation on floating numbers.
    """
    kind = reduction_kind(op)
    dtype = tensors[0].dtype
    _check_reduction(kind, dtype)
    low_precision = dtype.is_floating_point and dtype.itemsize < 4
    accumulator = tensors[0].detach().to(torch.float32 if low_precision else dtype, copy=True)
    if kind == RedOpType.PREMUL_SUM:
        accumulator.mul_(op.factor)
    for tensor in tensors[1:]:
        _accumulate(accumulator, tensor.detach().to(accumulator.dtype), kind, op)
    if kind == RedOpType.AVG:
        accumulator.div_(len(tensors))
    return accumulator.to(dtype)


def reduction_kind(op: Any) -> Any:
    """Returns the type of ``op``, which may be a ReduceOp or already its type; both occur in torch."""
    return getattr(op, "op", op)


def _accumulate(into: torch.Tensor, tensor: torch.Tensor, kind: Any, op: dist.ReduceOp) -> None:
    match kind:
        case RedOpType.SUM | RedOpType.AVG:
            into.add_(tensor)
        case RedOpType.PREMUL_SUM:
            into.add_(tensor * op.factor)
        case RedOpType.PRODUCT:
            into.mul_(tensor)
        case RedOpType.MIN:
            torch.minimum(into, tensor, out=into)
        case RedOpType.MAX:
            torch.maximum(into, tensor, out=into)
        case RedOpType.BAND:
            into.bitwise_and_(tensor)
        case RedOpType.BOR:
            into.bitwise_or_(tensor)
        case RedOpType.BXOR:
            into.bitwise_xor_(tensor)


def _check_reduction(kind: Any, dtype: torch.dtype) -> None:
    if kind in (RedOpType.AVG, RedOpType.PREMUL_SUM) and not dtype.is_floating_point:
        raise ValueError(f"reduction {kind.name} of {dtype}: needs a floating dtype; use SUM and divide")
    if kind in (RedOpType.BAND, RedOpType.BOR, RedOpType.BXOR) and dtype.is_floating_point:
        raise ValueError(f"reduction {kind.name} of {dtype}: needs an integer or bool dtype; view the bits first")
