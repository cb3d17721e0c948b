"""Partial attention results and their exact merge."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Partials, log-sum-exps and gradients accumulate in fp32; in fp64 where the inputs are fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Partial:
    """Attention of local queries over the keys seen so far.

    ``out``: ``[B, T/SP, H, D]``, normalised; ``lse``: ``[B, T/SP, H]``, natural log. Both in the accumulation
    dtype. A query that has seen no key has out 0 and lse -inf.
    """

    def __init__(self, queries: Tensor) -> None:
        dtype = accumulation_dtype(queries.dtype)
        self.out = queries.new_zeros(queries.shape, dtype=dtype)
        self.lse = queries.new_full(queries.shape[:3], -torch.inf, dtype=dtype)
        self._seen = np.zeros(queries.shape[:2], dtype=bool)  # on the host: asking it waits for no device

    def merge(self, batch: slice, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Takes in attention of these queries over further keys.

        ``out``: ``[b, n, H, D]``, ``lse``: ``[b, n, H]`` finite. The first partial of a row is assigned: a
        merge from -inf would be exact too, but costs a pass. Later ones: O += sigma(l' - l)(O' - O) and
        l = logaddexp(l, l') (the overflow-free form of ring-flash-attention).
        """
        old_out, old_lse = self.out[batch, rows], self.lse[batch, rows]
        if self._seen[batch, rows].any():
            weight = torch.sigmoid(lse - old_lse).unsqueeze(-1)
            old_out.lerp_(out.to(old_out.dtype), weight)
            torch.logaddexp(old_lse, lse, out=old_lse)
        else:
            old_out.copy_(out)
            old_lse.copy_(lse)
        self._seen[batch, rows] = True
