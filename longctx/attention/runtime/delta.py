"""Delta, rowsum(dout * out): the one number of a query that the backward pass needs of its output.

A delta is sent in the place of an output that is head_dim times longer. Fused kernels take the output, and use it for
that sum only. Where a delta has arrived, they are given a surrogate output that has the same sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype


def delta_of(dout: Tensor, out: Tensor) -> Tensor:
    """Returns delta ``[B, n, H]``, in the accumulation dtype, of dout and out ``[B, n, H, D]``."""
    dtype = accumulation_dtype(out.dtype)
    return (dout.to(dtype) * out.to(dtype)).sum(-1)


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    """Returns the shortest ``out`` with ``rowsum(dout * out) == delta``, in the dtype of dout.

    It is dout * delta / |dout|^2. All terms of its sum have one sign, so the sum is as exact as the dtype. It is never
    longer than the true output, so nothing overflows. Rows are scaled by their largest number before they are squared,
    which would vanish for small gradients. A row of zeros has delta 0 and surrogate 0.
    """
    largest = dout.abs().amax(-1, keepdim=True).to(delta.dtype).clamp_(min=torch.finfo(delta.dtype).tiny)
    unit = dout / largest
    square = (unit * unit).sum(-1, keepdim=True).clamp_(min=1.0)
    return unit.mul_(delta.unsqueeze(-1) / largest / square).to(dout.dtype)
