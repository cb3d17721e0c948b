"""The contract of mixers: what a linear layer computes between its projections, and what parallelism gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor

from longctx.sequence import Documents


@dataclass(frozen=True)
class Widths:
    """Channels of one head."""

    key: int
    value: int


class LinearCore(Protocol):
    """What parallelism gives to single-device code. ``group_name``: of the ranks that share the sequence, for mixers
    that bring operators of their own."""

    group_name: str


@dataclass(frozen=True)
class Mixer:
    name: str
    tokens: Callable[[Widths], dict[str, int]]
    parameters: Callable[[Widths], dict[str, tuple[int, ...]]]
    constants: Callable[[int, int, int], dict[str, Tensor]]
    initial: Callable[[str, Tensor, Generator], None]
    mix: Callable[[Mapping[str, Tensor], LinearCore, Tensor], Tensor]
    recurrence: Callable[[Mapping[str, Tensor], Sequence[Documents]], Tensor]
    normed: bool
    flops: Callable[[Widths, int], float]
