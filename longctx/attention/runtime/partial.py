"""Partial attention results and their exact merge."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from torch import Tensor

from longctx.sequence import Rows


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which partials, log-sum-exps and gradients accumulate: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Partial:
    """Accumulates attention of local queries over the keys seen so far.

    ``out``: ``[B, T/SP, H, D]``, normalised; ``lse``: ``[B, T/SP, H]``, natural log. Both are in the accumulation
    dtype. A query that has seen no key has out 0 and lse -inf.
    """

    def __init__(self, queries: Tensor) -> None:
        dtype = accumulation_dtype(queries.dtype)
        self.out = queries.new_zeros(queries.shape, dtype=dtype)
        self.lse = queries.new_full(queries.shape[:3], -torch.inf, dtype=dtype)
        self._seen = np.zeros(queries.shape[:2], dtype=bool)  # on the host: asking it waits for no device

    def of_heads(self, heads: slice) -> Partial:
        """Returns a partial of these heads that has seen nothing yet and writes into this one."""
        part = copy(self)
        part.out, part.lse, part._seen = self.out[:, :, heads], self.lse[:, :, heads], np.zeros_like(self._seen)
        return part

    def merge(self, batch: slice, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merges attention of these queries over further keys.

        ``out``: ``[b, n, H, D]``, ``lse``: ``[b, n, H]`` finite. The first partial of a row is assigned: a merge from
        -inf would be exact too, but costs a pass. Later ones: O += sigma(l' - l)(O' - O) and l = logaddexp(l, l') (the
        overflow-free form of ring-flash-attention).
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

    def merge_packed(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Merges what another rank computed of these queries: packed ``[B, rows, H, D]`` and ``[B, rows, H]``.

        Unlike in ``merge``, a query may have seen nothing, there, here or in both. sigma(-inf + inf) is then no number;
        the weight of nothing is 0.
        """
        for (start, stop), offset in zip(rows.intervals, rows.offsets, strict=True):
            old_out, old_lse = self.out[:, start:stop], self.lse[:, start:stop]
            other_lse = lse.narrow(1, offset, stop - start)
            weight = torch.sigmoid(other_lse - old_lse).masked_fill_(other_lse == -torch.inf, 0.0).unsqueeze(-1)
            old_out.lerp_(out.narrow(1, offset, stop - start), weight)
            torch.logaddexp(old_lse, other_lse, out=old_lse)
            self._seen[:, start:stop] = True
