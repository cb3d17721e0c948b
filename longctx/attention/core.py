"""Core attention as the model sees it: q, k, v of the local tokens in, their attention out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from longctx.attention.operator import DEFAULT, Options
from longctx.attention.registry import get_strategy
from longctx.comm import grid_of, group_of, two_way


@dataclass(frozen=True)
class Started:
    """Attention under way between ``start`` and ``finish``."""

    out: Tensor


class CoreAttention(Protocol):
    """What a block calls between its ``pre`` and its ``post``.

    ``start`` and ``finish`` are apart so that a layer loop may compute something else in between; strategies
    that overlap their own traffic do all their work in ``start``.
    """

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started: ...

    def finish(self, started: Started) -> Tensor: ...


class StrategyAttention:
    """A registered strategy on the ranks of one sequence group.

    ``group``: the process group whose ranks share the sequence; None for a sequence that is whole here.
    ``kernel``: name of a local kernel or "auto". ``scale``: softmax scale, None for 1/sqrt(D). ``inner``:
    neighbours in one row of the group, for strategies that see it as a grid (``registry.inner_of`` has their
    default); all ranks of the group then make it at one point. Refusals are the registry's; nothing is checked here.
    """

    def __init__(
        self,
        strategy: str,
        group: dist.ProcessGroup | None = None,
        kernel: str = "auto",
        scale: float | None = None,
        inner: int = 1,
        options: Options = DEFAULT,
    ) -> None:
        found = get_strategy(strategy)
        self._operator = found.operator
        ranks = group_of(group) if found.inner is None else grid_of(group, inner)
        self._group = (two_way(ranks) if found.two_way else ranks).name
        self._kernel = kernel
        self._scale = scale
        self._options = (options.backward, options.travel)

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``; ``plan``: the handle of the batch's plan."""
        scale = self._scale if self._scale is not None else q.shape[-1] ** -0.5
        out, _ = self._operator(q, k, v, plan, self._group, self._kernel, scale, *self._options)
        return Started(out)

    def finish(self, started: Started) -> Tensor:
        """Attention of the local queries, ``[B, T/SP, H/TP, D]``."""
        return started.out

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Tensor:
        return self.finish(self.start(q, k, v, plan))
