"""The form of an estimate: bytes and messages that a rank sends, and bytes that it keeps in memory.

A strategy names its estimate (``Strategy.costs``) or has none: nothing that runs depends on it. Most files of this
folder hold the ``COSTS`` of one strategy. ``tests/volume`` holds them to what ``sim`` carried and kept alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan


@dataclass(frozen=True)
class Volume:
    """Counts what one rank sends in one layer: bytes, then messages."""

    forward: int
    backward: int
    messages_forward: int
    messages_backward: int

    def __add__(self, other: Volume) -> Volume:
        return Volume(
            self.forward + other.forward,
            self.backward + other.backward,
            self.messages_forward + other.messages_forward,
            self.messages_backward + other.messages_backward,
        )


Sent = tuple[int, Volume]  # what one message of one rank costs, by the receiver's rank in the sequence group


def summed(sends: Callable[[SequencePlan, int, Sizes], list[Sent]]) -> Callable[[SequencePlan, int, Sizes], Volume]:
    """Returns the volume of a strategy that publishes what it sends to whom."""
    return lambda plan, rank, sizes: sum((cost for _, cost in sends(plan, rank, sizes)), Volume(0, 0, 0, 0))


@dataclass(frozen=True)
class Peak:
    """Counts bytes of tensors that are alive at one time on a rank.

    q, k, v, dout and kernels' workspace are not counted; results are. In 16-bit dtypes the true peak is never more,
    under any mask. Of most strategies it is just that; docs/volume.md names the others.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Costs:
    """Holds the closed forms of one strategy.

    ``volume(plan, rank, sizes)``: what a rank sends. ``peak_memory(plan, sizes)``: what the rank with most keeps alive.
    ``sends``: the terms of ``volume`` by receiver, where they are published; what crosses between nodes follows from
    them.
    """

    volume: Callable[[SequencePlan, int, Sizes], Volume]
    peak_memory: Callable[[SequencePlan, Sizes], Peak]
    sends: Callable[[SequencePlan, int, Sizes], list[Sent]] | None = None
