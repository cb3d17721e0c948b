"""Starts point-to-point exchanges and returns handles that are awaited once.

A message costs its sender its payload. An empty message is not sent at all, so both sides must know its size
beforehand. They do: sizes follow from the sequence plan.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from longctx.comm.group import ExchangeEvent, Group, Traffic

Message = tuple[int, Tensor]  # (rank within the group, contiguous tensor)


class Pending:
    """An exchange in flight; it holds its tensors, so that none is freed or reused before it has left."""

    def __init__(
        self, works: list[dist.Work], sends: Sequence[Message], receives: Sequence[Message], traffic: Traffic
    ) -> None:
        self._works = works
        self._sends = sends
        self._receives = receives
        self._traffic = traffic
        self._number = next(_numbers)
        self._awaited = False

    def wait(self) -> list[Tensor]:
        """Returns the received tensors, in the order they were asked for.

        On CUDA the current stream waits, not the host.
        """
        assert not self._awaited, "a pending exchange is awaited exactly once"
        self._awaited = True
        started = time.perf_counter()
        for work in self._works:
            work.wait()
        self.record(started, False)
        return [tensor for _, tensor in self._receives]

    def record(self, started: float, posted: bool) -> None:
        """Adds what began at ``started`` and is done now to the group's timeline, if it has one."""
        if self._traffic.timeline is None or not self._works:
            return
        ends = [tuple(peer for peer, tensor in part if tensor.numel()) for part in (self._sends, self._receives)]
        sends, receives = ends if posted else ((), ())
        self._traffic.timeline.append(
            ExchangeEvent(posted, self._number, started, time.perf_counter(), sends, receives)
        )


_numbers = itertools.count()


def exchange(group: Group, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
    """Starts all messages as one batch and returns at once.

    Between any two ranks messages match in the order in which both post them, as NCCL has no tags. So every rank must
    post its exchanges of one group in the same order of the algorithm's steps.

    Receives come first. Gloo sends a message when its receiver has said that it is ready. It says so on the connection
    that also carries messages the other way. After a send that word would wait behind all of it, and two ranks that
    swap blocks would use one direction after the other.
    """
    started = time.perf_counter()
    # An empty part of a buffer would keep all of it.
    sends = [message for message in sends if message[1].numel()]
    posted = [(dist.irecv, message) for message in receives] + [(dist.isend, message) for message in sends]
    operations = [
        dist.P2POp(call, tensor, group=group.process_group, group_peer=peer)
        for call, (peer, tensor) in posted
        if tensor.numel()
    ]
    for operation in operations:
        if operation.op is dist.isend:
            group.traffic.add(operation.tensor.numel() * operation.tensor.element_size(), operation.peer)
    works = dist.batch_isend_irecv(operations) if operations else []
    pending = Pending(works, sends, receives, group.traffic)
    pending.record(started, True)
    return pending
