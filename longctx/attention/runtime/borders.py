"""Borders of attention: what tensors must be before any kernel or message sees them.

A kernel reads memory by the sizes of its plan, and a message is as long as the plan says. A tensor of another shape
would be read past its end, or leave other ranks waiting. So whatever is not as it must be is refused here, by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.errors import ConfigError
from longctx.rules import kind_of

HANDLE = "plan.handle"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses anything but q ``[B, T/SP, H, D]``, k and v ``[B, T/SP, Hkv, D]`` of one dtype on one device."""
    shape, keys = q.shape, k.shape
    if (
        len(shape) == 4
        and len(keys) == 4
        and keys == v.shape
        and (shape[0], shape[1], shape[3]) == (keys[0], keys[1], keys[3])
        and shape[2]
        and keys[2]
        and shape[2] % keys[2] == 0
        and q.dtype is k.dtype is v.dtype
        and q.dtype in DTYPES
        and q.device == k.device == v.device
        and q.layout is k.layout is v.layout is torch.strided
    ):
        return
    require_numbers({"q": q, "k": k, "v": v})
    if len(shape) == 4 and len(keys) == 4 and shape[2] and keys[2] and shape[2] % keys[2]:
        raise ConfigError(
            f"{shape[2]} query heads must be a multiple of the {keys[2]} key/value heads; nearest valid: "
            f"{max(1, shape[2] // keys[2]) * keys[2]} query heads"
        )
    raise ConfigError(
        f"q {tuple(shape)}, k {tuple(keys)} and v {tuple(v.shape)} must be this rank's own tokens, q [B, T, H, D], "
        "k and v [B, T, Hkv, D] with the B, T and D of q"
    )


def require_numbers(tensors: dict[str, Tensor]) -> None:
    """Refuses tensors of several dtypes or devices, of a dtype that is not computed in, and sparse ones."""
    first, one = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ConfigError(f"{name} is of {tensor.dtype}; attention is computed in {kinds}")
        if tensor.dtype is not one.dtype or tensor.device != one.device:
            raise ConfigError(
                f"{name} is {tensor.dtype} on {tensor.device}, and {first} {one.dtype} on {one.device}: they must be "
                f"alike; cast {name} by .to({first})"
            )
        if tensor.layout is not torch.strided:
            raise ConfigError(f"{name} is of layout {tensor.layout}; it must be dense, as .to_dense() makes it")


def require_gradient(dout: Tensor, out: Tensor) -> None:
    """Refuses an upstream gradient that is not like the output; autograd gives no other, a direct call might."""
    if dout.shape != out.shape or dout.dtype is not out.dtype or dout.device != out.device:
        raise ConfigError(
            f"dout {tuple(dout.shape)} of {dout.dtype} on {dout.device} must be like the output, {tuple(out.shape)} of "
            f"{out.dtype} on {out.device}"
        )


def dense(tensor: Tensor) -> Tensor:
    """Returns the tensor with the channels of a head side by side in memory, which kernels take for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def require_plain(tensors: Sequence[tuple[str, Any]]) -> None:
    """Refuses what is no tensor, tensors that hide others, such as a DTensor, and those on several devices.

    ``tensors``: by name. A handle is on the CPU, wherever the others are.
    """
    for name, tensor in tensors:
        if type(tensor) is not Tensor:
            _require_seen(name, tensor)
    first, one = tensors[0]
    for name, tensor in tensors:
        if tensor.device != one.device and name != HANDLE:
            raise ConfigError(
                f"{name} is on {tensor.device} and {first} on {one.device}; move it by .to({first}.device)"
            )


def _require_seen(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{name} is {kind_of(tensor)}; it must be a torch.Tensor")
    kind = type(tensor)
    # Compilers and functional collectives put theirs around a tensor of this very rank.
    own = kind.__module__.startswith(("torch._subclasses.", "torch.distributed._functional_collectives"))
    if own or kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return
    hint = f"give {name}.to_local(), the part of this rank" if hasattr(tensor, "to_local") else "give what it holds"
    raise ConfigError(f"{name} is a {kind.__name__}, which hides what this rank has; {hint}")


def process_group_of(group: Any) -> dist.ProcessGroup | None:
    """Returns the process group that a user means: itself, that of a device mesh of one axis, or None."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ConfigError(f"a device mesh of {group.ndim} axes is no sequence group; give one axis, mesh['sp']")
        return process_group_of(group.get_group())
    raise ConfigError(
        f"group {group!r} is {kind_of(group)}; it must be a torch.distributed.ProcessGroup that this rank is in, a "
        "device mesh of one axis, or None for a sequence that is whole on this rank"
    )


def require_scale(scale: Any) -> None:
    """Refuses a softmax scale that is no finite number; None stands for 1/sqrt(D)."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (number and math.isfinite(scale)):
        raise ConfigError(f"scale={scale!r} of attention must be a finite number, or None for 1/sqrt(D)")
