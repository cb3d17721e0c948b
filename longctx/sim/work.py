"""Defines the handles of operations that are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Work

from longctx.sim.collectives import CollectiveCall, PendingCollective
from longctx.sim.messages import Receive
from longctx.sim.runtime import RankContext
from longctx.sim.tensors import dtype_name
from longctx.sim.trace import Event


@dataclass(slots=True)
class AwaitedCollective:
    """One member's share of a collective that its handle waits for."""

    context: RankContext
    collective: PendingCollective
    member: int
    call: CollectiveCall

    def ready(self) -> bool:
        return self.collective.complete and self.context.runtime.baton.turn >= self.collective.due

    def describe(self) -> str:
        missing = self.collective.missing()
        state = f"ranks {missing} have not arrived" if missing else "everyone has arrived"
        return f"{self.call.describe()} in {self.collective.title}: {state}"

    def deliver(self) -> None:
        self.collective.deliver(self.member, self.call)


@dataclass(slots=True)
class AwaitedReceive:
    """A receive that its handle waits for.

    Attributes:
        ranks: global ranks of the group.
        group: the group's title.
        not_before: turn of the baton before which the message doesn't count as arrived.
    """

    context: RankContext
    receive: Receive
    ranks: tuple[int, ...]
    group: str
    sequence: int
    not_before: int

    def ready(self) -> bool:
        message = self.receive.message
        return message is not None and self.context.runtime.baton.turn >= max(message.due, self.not_before)

    def describe(self) -> str:
        buffer, source, tag = self.receive.buffer, self.receive.source, self.receive.tag
        sender = "any rank" if source is None else f"rank {self.ranks[source]}"
        what = f"recv of {tuple(buffer.shape)} {dtype_name([buffer])} from {sender}"
        return f"{what} in {self.group}, tag {tag}, sequence {self.sequence}"

    def deliver(self) -> None:
        self.receive.deliver()


class _BufferedSend:
    """A send is complete at once: the message was copied."""

    def ready(self) -> bool:
        return True

    def describe(self) -> str:
        return "send"

    def deliver(self) -> None:
        pass


BUFFERED_SEND = _BufferedSend()
Awaited = AwaitedCollective | AwaitedReceive | _BufferedSend


class SimWork(Work):
    """The handle that torch returns to callers of an operation.

    Args:
        context: the rank that posted the operation.
        what: the operation; its results are delivered on the first wait.
        tensors: what ``result()`` and the future give.
        post: the operation's event in the trace, None without a trace; the first wait adds its counterpart.
    """

    def __init__(
        self, context: RankContext, what: Awaited, tensors: Sequence[torch.Tensor], post: Event | None
    ) -> None:
        super().__init__()
        self._context = context
        self._what = what
        self._tensors = list(tensors)
        self._post = post
        self._waited = False
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks the rank until the operation is done and its results are in place; timeouts are not kept."""
        if not self._waited:
            self._context.wait(self._what)
            self._what.deliver()
            self._waited = True
            if self._post is not None:
                self._context.record(self._wait_event(self._post))
        return True

    def is_completed(self) -> bool:
        """Returns whether ``wait`` would not block; a False lets the other ranks run, so polling makes progress."""
        if not self._waited and not self._what.ready():
            self._context.runtime.baton.poll(self._context.rank)
        return self._waited or self._what.ready()

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
        """Returns the group rank of the sender of a received message, -1 for other operations."""
        message = self._what.receive.message if isinstance(self._what, AwaitedReceive) else None
        return -1 if message is None else message.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Returns a completed future.

        It waits here: to wait on a future would block the process, not the rank.
        """
        if self._future is None:
            self.wait()
            self._future = torch.futures.Future()
            self._future.set_result(self._tensors)
        return self._future

    def _wait_event(self, post: Event) -> Event:
        peers, sequence = post.peers, post.sequence
        if isinstance(self._what, AwaitedReceive) and self._what.receive.source is None:
            message = self._what.receive.message
            assert message is not None
            peers, sequence = (self._what.ranks[message.source],), message.sequence
        return Event("wait", post.id, self._context.step, *post[3:7], peers, *post[8:11], sequence)


class CoalescedWork(Work):
    """One handle that stands for all operations of a coalescing context."""

    def __init__(self, works: Sequence[SimWork]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for all operations."""
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
