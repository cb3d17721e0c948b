"""Holds what the ranks of one run share, and which rank a thread is."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from longctx.sim.baton import Baton, Waitable
from longctx.sim.collectives import PendingCollective
from longctx.sim.errors import RankKilled
from longctx.sim.faults import Fault, FaultInjector
from longctx.sim.ledger import Ledger
from longctx.sim.messages import MessageQueue
from longctx.sim.trace import Event, Trace

GroupKey = tuple[str, tuple[int, ...]]  # c10d's name of the group, its global ranks


@dataclass(slots=True)
class _Forever:
    operation: str

    def ready(self) -> bool:
        return False

    def describe(self) -> str:
        return f"hung by the fault plan in {self.operation}"


@dataclass
class Runtime:
    """The state that all ranks of one ``Cluster.run`` share; only the holder of the baton touches it."""

    world_size: int
    baton: Baton
    ledger: Ledger
    trace: Trace
    injector: FaultInjector
    collectives: dict[tuple[GroupKey, int], PendingCollective] = field(default_factory=dict)
    message_queues: dict[GroupKey, MessageQueue] = field(default_factory=dict)

    def message_queue(self, key: GroupKey) -> MessageQueue:
        """Returns the messages of one group that are under way."""
        if key not in self.message_queues:
            self.message_queues[key] = MessageQueue()
        return self.message_queues[key]


@dataclass
class RankContext:
    """What a rank thread needs to know of its run: its rank, its step, the shared state."""

    rank: int
    runtime: Runtime
    step: int = 0

    def enter(self, operation: str) -> Fault | None:
        """Begins an operation: stops the rank if the run is over, and applies what the fault plan says.

        Returns:
            A fault of kind "drop", "delay" or "corrupt" for the caller to apply, else None.
        """
        self.runtime.baton.check()
        fault = self.runtime.injector.strike(self.rank, self.step, operation)
        if fault is not None and fault.kind == "kill":
            raise RankKilled(f"rank {self.rank} killed by the fault plan in {operation} of step {self.step}")
        if fault is not None and fault.kind == "hang":
            self.wait(_Forever(operation))
        return fault

    def wait(self, what: Waitable) -> None:
        """Blocks this rank until ``what`` is ready."""
        self.runtime.baton.wait(self.rank, what)

    def record(self, event: Event) -> None:
        """Appends an event to this rank's trace."""
        self.runtime.trace.add(self.rank, event)


_thread = threading.local()


def set_rank_context(context: RankContext | None) -> None:
    """Sets which rank this thread is; None when it is none any more."""
    _thread.context = context


def current_rank_context() -> RankContext | None:
    """Returns the calling thread's rank, None outside of rank threads."""
    return getattr(_thread, "context", None)


def mark_step(step: int) -> None:
    """Says that the calling rank enters this step, for fault plans and traces.

    Outside of a simulated cluster this does nothing, so a callback that calls it also runs elsewhere.
    """
    context = current_rank_context()
    if context is not None:
        context.step = step
        context.record(Event("step", context.runtime.trace.next_id(), step, "step"))
