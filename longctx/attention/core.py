"""Core attention as the model calls it: local q, k and v go in, attention of the local queries comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from longctx.attention.runtime.borders import HANDLE, process_group_of, require_plain, require_scale
from longctx.attention.runtime.local_kernel import load_kernel
from longctx.attention.runtime.operator import encoded
from longctx.attention.runtime.registry import Strategy, chosen_row, get_strategy, option_refused
from longctx.comm import Group, grid_of, group_of, two_way
from longctx.errors import ConfigError
from longctx.options import DEFAULT, StrategyOptions


@dataclass(frozen=True)
class Started:
    """Holds attention that has started and not finished."""

    out: Tensor


class CoreAttention(Protocol):
    """Computes attention between the input and output projections of a block.

    ``start`` and ``finish`` are apart so that a layer loop may compute something else in between. Strategies that
    overlap their own communication do all their work in ``start``.
    """

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started: ...

    def finish(self, started: Started) -> Tensor: ...


class StrategyAttention:
    """Runs a registered strategy on the ranks of one sequence group.

    ``group``: the process group whose ranks share the sequence, or a device mesh of one axis; None for a sequence that
    is whole on this rank.
    ``kernel``: name of a local kernel, or "auto". ``scale``: softmax scale, None for 1/sqrt(D). ``options``: what the
    strategy lets users choose.

    Strategies that see the group as a grid have rows of single ranks where the options name no number
    (``registry.settled`` names the best). All ranks of the group then make this object at the same point.
    """

    def __init__(
        self,
        strategy: str,
        group: dist.ProcessGroup | None = None,
        kernel: str = "auto",
        scale: float | None = None,
        options: StrategyOptions = DEFAULT,
    ) -> None:
        found = get_strategy(strategy)
        if not isinstance(options, StrategyOptions):
            raise ConfigError(f"options {options!r} must be StrategyOptions(...); leave them out for the defaults")
        reason = option_refused(found, options)
        if reason:
            raise ConfigError(f"attention.strategy={strategy} refuses: {reason}")
        self._operator = found.operator
        if kernel != "auto":
            load_kernel(kernel)  # refuses a name that is none, before any work
        require_scale(scale)
        self._group = _ranks(found, process_group_of(group), options).name
        self._kernel = kernel
        self._scale = scale
        self._options = encoded(options)

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """Starts attention of the local tokens.

        q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``. ``plan``: the handle of the batch's plan.
        """
        require_plain((("q", q), ("k", k), ("v", v), (HANDLE, plan)))
        scale = self._scale if self._scale is not None else q.shape[-1] ** -0.5
        out, _ = self._operator(q, k, v, plan, self._group, self._kernel, scale, self._options)
        return Started(out)

    def finish(self, started: Started) -> Tensor:
        """Returns attention of the local queries, ``[B, T/SP, H/TP, D]``."""
        return started.out

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Tensor:
        return self.finish(self.start(q, k, v, plan))


def _ranks(strategy: Strategy, process_group: dist.ProcessGroup | None, options: StrategyOptions) -> Group:
    """The group as the strategy sees it."""
    group, grid = group_of(process_group), strategy.grid
    if grid is not None:
        row = group.size if grid.option is None else chosen_row(strategy, options) or 1
        if group.size % row:
            raise ConfigError(
                f"attention.{grid.option}={row}: attention.strategy={strategy.name} on {group.size} ranks takes "
                f"divisors of {group.size}"
            )
        group = grid_of(process_group, row)
    return two_way(group) if strategy.two_way else group
