"""Defines what a step needs of an engine; decisions (scale, clipping, skipping) stay in ``longctx.train``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from longctx.config import Config

if TYPE_CHECKING:  # a declaration is read with the configuration, long before torch is needed
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from longctx.mesh import Mesh
    from longctx.sequence import LocalBatch


class Engine(Protocol):
    """Runs forward, backward and update of a step.

    Gradients are sums over all ranks that hold different tokens, never means.
    """

    def accumulate(self, batches: Sequence[LocalBatch], scale: float) -> Tensor:
        """Runs forward and backward of all micro-batches of a step.

        Adds ``scale`` times the gradient of the global sum of the loss. Returns this rank's own sum of the
        loss, unscaled, a scalar; ranks that hold the same tokens return the same.
        """
        ...

    def evaluate(self, batches: Sequence[LocalBatch]) -> Tensor:
        """Runs forward alone; returns this rank's own sum of the loss as ``accumulate`` does, and keeps nothing."""
        ...

    def squared_norm(self) -> Tensor:
        """Returns this rank's share of the gradient's squared norm, fp64 scalar; shares add up over all ranks."""
        ...

    def update(self, lr: float, coefficient: float) -> None:
        """Takes one step of the optimizer with gradients times ``coefficient``, which are then gone."""
        ...

    def discard(self) -> None:
        """Drops the gradients without an update."""
        ...


def refuses_nothing(config: Config) -> str | None:
    """Returns None for any configuration: the engine drives every run."""
    return None


@dataclass(frozen=True)
class EngineKind:
    """Declares an engine; ``longctx.catalog`` maps its name to it.

    ``drive(model, optimizer, config, mesh)``: builds the engine of a run. ``refuses``: why it does not execute a
    configuration, with the nearest valid choice.
    """

    name: str
    drive: Callable[[nn.Module, Optimizer, Config, Mesh], Engine]
    refuses: Callable[[Config], str | None] = refuses_nothing
