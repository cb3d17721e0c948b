"""Posts one rank's operations in one group to ledger, trace, fault plan and the other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longctx.sim.collectives import CollectiveCall, Combine, PendingCollective
from longctx.sim.faults import Fault, with_flipped_bit
from longctx.sim.ledger import Sent
from longctx.sim.messages import Message, Receive
from longctx.sim.runtime import RankContext
from longctx.sim.tensors import check_contiguous, dtype_name, has_no_data, nbytes, shapes, without_dispatch_modes
from longctx.sim.trace import Event
from longctx.sim.work import BUFFERED_SEND, Awaited, AwaitedCollective, AwaitedReceive, SimWork

Tensors = Sequence[torch.Tensor]


class GroupMember:
    """Posts operations of one rank in one group.

    Args:
        context: the rank.
        name: c10d's unique name of the group.
        ranks: global ranks of the group.
        position: of this rank in ``ranks``, its group rank.
    """

    def __init__(self, context: RankContext, name: str, ranks: tuple[int, ...], position: int) -> None:
        self.ranks = ranks
        self.position = position
        self.collectives = 0  # posted so far: the next one's sequence number
        self._context = context
        self._key = (name, ranks)
        self.describe("")

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @property
    def name(self) -> str:
        """The group's unique name in c10d."""
        return self._key[0]

    def describe(self, description: str) -> None:
        """Sets what the group is for; reports show it beside the name."""
        detail = f" ({description})" if description else ""
        self.title = f"group {self.name!r}{detail} of ranks {list(self.ranks)}"

    def start_collective(self, call: CollectiveCall, combine: Combine, sent: Sent, tensors: Tensors) -> SimWork:
        """Joins the group's next collective and returns its handle.

        Args:
            call: what this rank brings.
            combine: computes all ranks' results.
            sent: (group rank, bytes) by the ledger's conventions.
            tensors: what the handle's ``result()`` gives.
        """
        check_contiguous(call.operation, call.inputs)
        fault = self._context.enter(call.operation)
        sequence, self.collectives = self.collectives, self.collectives + 1
        others = self.ranks[: self.position] + self.ranks[self.position + 1 :]
        post = self._post(call.operation, call.inputs, sent, others, 0, sequence)
        if fault is not None and fault.kind == "corrupt":
            with without_dispatch_modes():
                call.inputs = _with_first_corrupted(call.inputs, fault)
        collectives, key = self._context.runtime.collectives, (self._key, sequence)
        collective = collectives.get(key)
        if collective is None:
            collective = collectives[key] = PendingCollective(f"{self.title}, sequence {sequence}", self.ranks, combine)
        collective.check(self.position, call)
        collective.due = max(collective.due, self._due(fault))
        if fault is None or fault.kind != "drop":
            collective.arrive(self.position, call)
            if collective.complete:
                del collectives[key]
        return SimWork(self._context, AwaitedCollective(self._context, collective, self.position, call), tensors, post)

    def send(self, tensor: torch.Tensor, destination: int, tag: int) -> SimWork:
        """Sends a copy to the group rank ``destination``."""
        check_contiguous("send", [tensor])
        fault = self._context.enter("send")
        queue = self._context.runtime.message_queue(self._key)
        sequence = queue.next_sequence("send", self.position, destination, tag)
        sent = [(destination, nbytes([tensor]))]
        post = self._post("send", [tensor], sent, (self.ranks[destination],), tag, sequence)
        message = Message(self.position, tag, tensor.numel(), tensor.dtype, None, sequence, self._due(fault))
        if not has_no_data([tensor]):
            with without_dispatch_modes():
                message.payload = tensor.detach().clone()
                if fault is not None and fault.kind == "corrupt":
                    message.payload = _with_first_corrupted([message.payload], fault)[0]
        if fault is None or fault.kind != "drop":
            queue.send(destination, message)
        return SimWork(self._context, BUFFERED_SEND, [tensor], post)

    def receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> SimWork:
        """Receives from the group rank ``source``, or from any rank if None."""
        check_contiguous("recv", [tensor])
        fault = self._context.enter("recv")
        queue = self._context.runtime.message_queue(self._key)
        sequence = queue.next_sequence("recv", source, self.position, tag)
        peers = () if source is None else (self.ranks[source],)
        post = self._post("recv", [tensor], [], peers, tag, sequence)
        receive = Receive(source, tag, tensor)
        queue.receive(self.position, receive)
        what: Awaited = AwaitedReceive(self._context, receive, self.ranks, self.title, sequence, self._due(fault))
        return SimWork(self._context, what, [tensor], post)

    def _post(
        self, operation: str, tensors: Tensors, sent: Sent, peers: tuple[int, ...], tag: int, sequence: int
    ) -> Event | None:
        """Enters an operation in the ledger and, if there is one, in the trace."""
        context, runtime = self._context, self._context.runtime
        to_global = [(self.ranks[position], count) for position, count in sent]
        total = runtime.ledger.add(operation, context.rank, to_global)
        if not runtime.trace.enabled:
            return None
        event = Event(
            phase="post",
            id=runtime.trace.next_id(),
            step=context.step,
            operation=operation,
            bytes=total,
            group=self.name,
            ranks=self.ranks,
            peers=peers,
            shapes=shapes(tensors),
            dtype=dtype_name(tensors),
            tag=tag,
            sequence=sequence,
        )
        context.record(event)
        return event

    def _due(self, fault: Fault | None) -> int:
        """Returns the turn of the baton at which what is posted now arrives."""
        if fault is None or fault.kind != "delay":
            return 0
        baton = self._context.runtime.baton
        due = baton.turn + fault.turns
        baton.expect_at(due)
        return due


def _with_first_corrupted(tensors: Tensors, fault: Fault) -> list[torch.Tensor]:
    """Returns the tensors with the first one that holds numbers replaced by a corrupted copy."""
    result = list(tensors)
    for position, tensor in enumerate(result):
        if tensor.numel() and not has_no_data([tensor]):
            result[position] = with_flipped_bit(tensor, fault)
            break
    return result
