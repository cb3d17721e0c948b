"""Handles of operations under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Work

from longctx.sim.collectives import Call, Meeting
from longctx.sim.messages import Receive
from longctx.sim.runtime import Seat
from longctx.sim.trace import Event


@dataclass(slots=True)
class AwaitedMeeting:
    """One member's share of a collective."""

    seat: Seat
    meeting: Meeting
    member: int
    call: Call

    def ready(self) -> bool:
        return self.meeting.complete and self.seat.runtime.baton.turn >= self.meeting.due

    def describe(self) -> str:
        missing = self.meeting.missing()
        state = f"ranks {missing} have not arrived" if missing else "the result is delayed"
        return f"{self.call.describe()} in {self.meeting.title}: {state}"

    def deliver(self) -> None:
        self.meeting.deliver(self.member, self.call)


@dataclass(slots=True)
class AwaitedReceive:
    """A receive; ``title`` names buffer, sender, group, tag and sequence number."""

    seat: Seat
    receive: Receive
    title: str
    not_before: int

    def ready(self) -> bool:
        message = self.receive.message
        return message is not None and self.seat.runtime.baton.turn >= max(message.due, self.not_before)

    def describe(self) -> str:
        return self.title

    def deliver(self) -> None:
        self.receive.deliver()


@dataclass(slots=True)
class BufferedSend:
    """A send is complete at once: the message was copied."""

    title: str

    def ready(self) -> bool:
        return True

    def describe(self) -> str:
        return self.title

    def deliver(self) -> None:
        pass


class SimWork(Work):
    """The handle that torch returns to callers.

    Args:
        seat: the rank that posted the operation.
        what: the operation; its results are delivered on the first wait.
        tensors: what ``result()`` and the future give.
        awaited: makes the trace event of the first wait.
    """

    def __init__(
        self,
        seat: Seat,
        what: AwaitedMeeting | AwaitedReceive | BufferedSend,
        tensors: Sequence[torch.Tensor],
        awaited: Callable[[], Event],
    ) -> None:
        super().__init__()
        self._seat = seat
        self._what = what
        self._tensors = list(tensors)
        self._awaited: Callable[[], Event] | None = awaited
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block the rank until the operation is done and its results are in place. Timeouts are not kept."""
        if self._awaited is not None:
            self._seat.wait(self._what)
            self._finish()
        return True

    def is_completed(self) -> bool:
        """True once ``wait`` would not block; a False lets the other ranks run, so polling makes progress."""
        if self._awaited is not None and not self._what.ready():
            self._seat.runtime.baton.poll(self._seat.rank)
        return self._awaited is None or self._what.ready()

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """Group rank of the sender of a received message."""
        message = self._what.receive.message if isinstance(self._what, AwaitedReceive) else None
        return -1 if message is None else message.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """A completed future. Waiting on a future would block the process, not the rank, so it waits here."""
        if self._future is None:
            self.wait()
            self._future = torch.futures.Future()
            self._future.set_result(self._tensors)
        return self._future

    def _finish(self) -> None:
        assert self._awaited is not None
        self._what.deliver()
        self._seat.record(self._awaited())
        self._awaited = None


class CoalescedWork(Work):
    """All operations of one coalescing context."""

    def __init__(self, works: Sequence[SimWork]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for all of them."""
        return all(work.wait() for work in self._works)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(self.result())
        return future
