"""The one number of a query that the backward pass needs of its output: delta = rowsum(dout * out).

A delta travels in the place of an output that is head_dim times longer. Fused kernels take the output, and use it
for that sum only; so where a delta has arrived, they are given a stand-in that has the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype


def delta_of(dout: Tensor, out: Tensor) -> Tensor:
    """``[B, n, H]`` in the accumulation dtype, of dout and out ``[B, n, H, D]``."""
    dtype = accumulation_dtype(out.dtype)
    return (dout.to(dtype) * out.to(dtype)).sum(-1)


def stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """The shortest ``out`` with ``rowsum(dout * out) == delta``: dout * delta / |dout|^2, in the dtype of dout.

    All terms of its sum have one sign, so the sum is as exact as the dtype; and it is never longer than the true
    output, so nothing overflows. Rows are scaled by their largest number before they are squared, which would
    vanish for small gradients; a row of zeros has delta 0 and stand-in 0.
    """
    largest = dout.abs().amax(-1, keepdim=True).to(delta.dtype).clamp_(min=torch.finfo(delta.dtype).tiny)
    unit = dout / largest
    square = (unit * unit).sum(-1, keepdim=True).clamp_(min=1.0)
    return unit.mul_(delta.unsqueeze(-1) / largest / square).to(dout.dtype)
