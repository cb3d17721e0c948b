"""Exchanges messages that are cut into parts, some of which other ranks carry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.comm.exchange import Message, Pending, exchange
from longctx.comm.group import Group

# Tensor's number, bytes [start, stop) of it, and the ranks that it is at between hops.
MessagePart = tuple[int, int, int, tuple[int, ...]]


class Relay:
    """An exchange that takes three hops; all ranks of the group call it at the same point, and it is awaited once.

    ``parts``: those in which this rank takes part, in an order that all ranks share; ``number`` counts the messages
    from one rank to one other. The first hop is complete when this is made, the second is under way until ``wait``.
    Parts are views of the messages, which neither copies nor changes their bytes; carriers alone allocate buffers.
    """

    def __init__(
        self, group: Group, sends: Sequence[Message], receives: Sequence[Message], parts: Sequence[MessagePart]
    ) -> None:
        self._group, self._sends, self._receives, self._parts = group, sends, receives, parts
        self._device = next((tensor.device for _, tensor in (*sends, *receives)), None)
        send_bytes, self._receive_bytes = _by_peer(sends), _by_peer(receives)
        self._in_transit = {
            place: send_bytes[path[-1]][number][start:stop]
            for place, (number, start, stop, path) in enumerate(parts)
            if path[0] == group.rank
        }
        self._hop(0).wait()
        self._second_hop = self._hop(1)

    def wait(self) -> list[Tensor]:
        """Returns the received tensors, in the order they were asked for."""
        self._second_hop.wait()
        self._hop(2).wait()
        self._in_transit.clear()
        return [tensor for _, tensor in self._receives]

    def _hop(self, hop: int) -> Pending:
        rank, sends, receives = self._group.rank, [], []
        for place, (number, start, stop, path) in enumerate(self._parts):
            before, after = path[hop : hop + 2]
            if before == after:
                continue
            if before == rank:
                sends.append((after, self._in_transit.pop(place)))
            elif after == rank:
                mine = path[-1] == rank
                buffer = self._receive_bytes[path[0]][number][start:stop] if mine else self._buffer(stop - start)
                receives.append((before, buffer))
                self._in_transit[place] = buffer
        return exchange(self._group, sends, receives)

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _by_peer(messages: Sequence[Message]) -> dict[int, list[Tensor]]:
    """Returns the bytes of contiguous messages, in order of each peer."""
    found: dict[int, list[Tensor]] = {}
    for peer, tensor in messages:
        found.setdefault(peer, []).append(tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor)
    return found
