"""Matches point-to-point messages: sends are buffered, receives match in the order in which they were posted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from longctx.sim.errors import MismatchError
from longctx.sim.tensors import copy_data, without_dispatch_modes


@dataclass(slots=True, eq=False)
class Message:
    """A message that is on its way.

    Attributes:
        source: sender's rank in the group.
        payload: a private copy of the numbers; None for a fake tensor.
        sequence: counts messages of the same (group, sender, receiver, tag).
        due: turn of the baton before which the message has not arrived.
    """

    source: int
    tag: int
    numel: int
    dtype: torch.dtype
    payload: torch.Tensor | None
    sequence: int
    due: int = 0


@dataclass(slots=True, eq=False)
class Receive:
    """A posted receive that waits for a message; ``source`` None takes one from any rank."""

    source: int | None
    tag: int
    buffer: torch.Tensor
    message: Message | None = None

    def accepts(self, message: Message) -> bool:
        """Returns whether source and tag fit."""
        return self.tag == message.tag and self.source in (None, message.source)

    def deliver(self) -> None:
        """Copies the message into the buffer.

        Raises:
            MismatchError: the buffer's size or dtype is not the message's.
        """
        message = self.message
        assert message is not None
        if message.numel != self.buffer.numel() or message.dtype != self.buffer.dtype:
            raise MismatchError(
                f"message {message.sequence} with tag {message.tag} from group rank {message.source} has "
                f"{message.numel} elements of {message.dtype}, the receive buffer is {tuple(self.buffer.shape)} "
                f"{self.buffer.dtype}; sizes and dtypes of sender and receiver must agree"
            )
        if message.payload is not None:
            with without_dispatch_modes():
                copy_data(self.buffer, message.payload)


class MessageQueue:
    """Messages of one group that nobody has received yet, and receives that still wait for one."""

    def __init__(self) -> None:
        self._waiting: defaultdict[int, list[Receive]] = defaultdict(list)
        self._unclaimed: defaultdict[int, list[Message]] = defaultdict(list)
        self._counts: defaultdict[tuple[str, int | None, int, int], int] = defaultdict(int)

    def next_sequence(self, side: str, source: int | None, destination: int, tag: int) -> int:
        """Returns the number of the next message, or of the next receive, between this pair with this tag."""
        key = side, source, destination, tag
        self._counts[key] += 1
        return self._counts[key] - 1

    def send(self, destination: int, message: Message) -> None:
        """Gives the message to the first posted receive that accepts it, or keeps it for a later one."""
        waiting = self._waiting[destination]
        for position, receive in enumerate(waiting):
            if receive.accepts(message):
                receive.message = message
                del waiting[position]
                return
        self._unclaimed[destination].append(message)

    def receive(self, destination: int, receive: Receive) -> None:
        """Takes the earliest message that fits, or waits for one."""
        unclaimed = self._unclaimed[destination]
        for position, message in enumerate(unclaimed):
            if receive.accepts(message):
                receive.message = message
                del unclaimed[position]
                return
        self._waiting[destination].append(receive)
