"""Records what each rank did, in its own order.

A trace holds no times: the order in which the baton went around is not the order of time. Times come from
replaying traces against a clock. For that an event says what was moved and between whom. It also says where in the
rank's program it was started ("post") and awaited ("wait").
"""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Event(NamedTuple):
    """One entry of a rank's trace, which says what happened to one operation.

    Attributes:
        phase: "post" (an operation started), "wait" (its handle was awaited; same ``id``), "compute" or
            "step" (``mark_step``).
        id: unique in the run; the post and the wait of one operation share it.
        step: the rank's step at that moment.
        operation: the ledger's name of the operation, or "recv"; for compute the operator, "aten.mm".
        bytes: what this rank sends by the ledger's conventions; for compute, bytes of the tensors read and
            written.
        group: name of the process group, "" for compute.
        ranks: the group's global ranks.
        peers: global ranks on the other side: the receiver, the sender, or all others of the group. Empty
            for a receive from any source; its wait event names the sender.
        shapes: of the tensors that this rank puts in (for a receive: the buffer's).
        dtype: of these, "float32"; "" without tensors.
        tag: of a message, else 0.
        sequence: counts the group's collectives, or the messages of one (sender, receiver, tag). Posts on
            different ranks that belong together have the same group and sequence.
        flops: of compute.
    """

    phase: str
    id: int
    step: int
    operation: str
    bytes: int = 0
    group: str = ""
    ranks: tuple[int, ...] = ()
    peers: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: str = ""
    tag: int = 0
    sequence: int = 0
    flops: int = 0


class Trace:
    """Collects the events of all ranks; ``events[rank]`` is that rank's list."""

    def __init__(self, world_size: int, enabled: bool) -> None:
        self.enabled = enabled
        self.events: list[list[Event]] = [[] for _ in range(world_size)]
        self._ids = itertools.count()

    def next_id(self) -> int:
        """Returns an id that no other operation of the run has."""
        return next(self._ids)

    def add(self, rank: int, event: Event) -> None:
        """Appends to the rank's list, unless tracing is off."""
        if self.enabled:
            self.events[rank].append(event)
