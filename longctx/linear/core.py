"""The core of a linear layer as the model sees it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from longctx.comm import group_of
from longctx.linear.operator import delta_attention, diagonal_attention
from longctx.linear.short_convolution import convolve

CHUNK = 64

class LinearAttention:
    """A registered strategy on the ranks of one sequence group."""

    def __init__(self, strategy: str, group: dist.ProcessGroup | None = None, chunk: int = CHUNK) -> None:
        self._strategy = strategy
        self._group = group_of(group).name
        self._chunk = chunk

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        context = (plan, self._group, self._strategy, self._chunk)
        if beta is not None:
            assert log_decay is not None
            return delta_attention(q, k, v, [log_decay, beta], *context)[0]
        return diagonal_attention(q, k, v, [] if log_decay is None else [log_decay], *context)[0]

    def convolve(self, x: Tensor, weight: Tensor, plan: Tensor) -> Tensor:
        return convolve(x, weight, plan, self._group)
