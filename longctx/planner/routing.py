"""Routes messages where a node has several NICs, for all messages of an exchange at once (Zeppelin, 2025).

A message to another node leaves by its sender's NIC, while the node's others may be idle. Routed, it is cut into x
parts: one goes straight, and each other one by another NIC of the node.

    hop 1, inside nodes:    sender -> proxies; and messages that stay in their node
    hop 2, between nodes:   each proxy -> its counterpart in the receiver's node; sender -> receiver
    hop 3, inside nodes:    counterparts -> receiver
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from longctx.planner.cost import Topology
from longctx.planner.planners.zeppelin import route
from longctx.planner.slices import Int64

HOPS = 3
# Tensor's number, bytes [start, stop) of it, and the ranks that it is at between hops.
MessagePart = tuple[int, int, int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Routes:
    """Parts of messages, and the ranks that each part passes.

    ``number`` of the tensor among those from rank to rank, its bytes ``[start, stop)``, int64 ``[N]``. ``path``: the
    ranks that hold them before, between and after the hops, int64 ``[N, 4]``.
    """

    number: Int64
    start: Int64
    stop: Int64
    path: Int64

    def of(self, rank: int) -> list[MessagePart]:
        """Returns the parts that a rank sends, carries or receives, in an order that all ranks share."""
        mine = np.flatnonzero((self.path == rank).any(axis=1))
        columns = (self.number[mine].tolist(), self.start[mine].tolist(), self.stop[mine].tolist())
        return list(zip(*columns, map(tuple, self.path[mine].tolist()), strict=True))

    def sent(self, rank: int) -> tuple[int, int]:
        """Returns the bytes and messages that a rank sends, including those of others that it hands on."""
        moves = (self.path[:, :-1] == rank) & (self.path[:, 1:] != rank)
        return int(((self.stop - self.start)[:, None] * moves).sum()), int(moves.sum())

    def carried(self, rank: int) -> int:
        """Returns the bytes that a rank holds for others."""
        inner = (self.path[:, 1:-1] == rank).any(axis=1) & (self.path[:, 0] != rank) & (self.path[:, -1] != rank)
        return int((self.stop - self.start)[inner].sum())

    def seconds(self, topology: Topology) -> float:
        """Returns the time of messages that are cut or cross nodes, hop by hop.

        A hop takes as long as the busiest rank's link, or its NIC between nodes.
        """
        crosses = topology.node(self.path[:, 0]) != topology.node(self.path[:, -1])
        size, total = (self.stop - self.start)[crosses], 0.0
        for hop in range(HOPS):
            ends, rate = self.path[crosses][:, hop : hop + 2].T, topology.link
            moved = np.where(ends[0] == ends[1], 0, size)
            if hop == 1:
                ends, rate = np.array([_nic(topology, rank) for rank in ends]), topology.nic
            total += max(np.bincount(side, weights=moved).max(initial=0.0) for side in ends) / rate
        return total


def routes(sizes: Int64, topology: Topology) -> Routes | None:
    """Routes the messages of an exchange; returns None where no cut is faster than going straight.

    ``sizes``: bytes of each tensor from rank to rank, int64 ``[K, W, W]``; what stays on a rank does not move. A
    message alone is cut as ``route`` says. If all senders of a node have as much to send, their NICs are busy anyway,
    and cuts would only add hops.
    """
    if topology.nodes == 1 or topology.nics == 1:
        return None
    number, source, dest = np.nonzero(np.asarray(sizes) * (1 - np.eye(topology.servers, dtype=np.int64)))
    size = np.asarray(sizes)[number, source, dest]
    straight = _cut(number, source, dest, size, np.ones_like(size), topology)
    cut = _cut(number, source, dest, size, _ways(source, dest, topology), topology)
    return cut if cut.seconds(topology) < straight.seconds(topology) else None


def _ways(source: Int64, dest: Int64, topology: Topology) -> Int64:
    """Returns the NICs for each message: at most those that both nodes have; inside a node none is used."""
    most = np.minimum(_nics(topology, source), _nics(topology, dest))
    # All times are proportional to the volume.
    best = [1, *(route(1.0, replace(topology, nics=nics))[0] for nics in range(1, topology.per_node + 1))]
    ways = np.array(best, dtype=np.int64)[most]
    return np.where(topology.node(source) == topology.node(dest), 1, ways)


def _cut(number: Int64, source: Int64, dest: Int64, size: Int64, ways: Int64, topology: Topology) -> Routes:
    """Cuts each message into so many parts, equal to within a byte.

    The first goes straight, by the sender's and receiver's own NICs, the others by the following ones of both nodes.
    """
    of = np.repeat(np.arange(len(size)), ways)
    part = np.arange(len(of)) - np.repeat(np.cumsum(ways) - ways, ways)
    source, dest, whole = source[of], dest[of], size[of]
    start, stop = whole * part // ways[of], whole * (part + 1) // ways[of]
    there, back = _proxy(topology, source, part), _proxy(topology, dest, part)
    inside = topology.node(source) == topology.node(dest)
    path = np.stack([source, np.where(inside, dest, there), np.where(inside, dest, back), dest], axis=1)
    kept = stop > start
    return Routes(number[of][kept], start[kept], stop[kept], path[kept])


def _members(topology: Topology, rank: Int64) -> Int64:
    """Returns how many ranks a rank's node has; the last node may have fewer."""
    first = topology.node(rank) * topology.per_node
    return np.minimum(topology.per_node, topology.servers - first)


def _sharing(topology: Topology) -> int:
    """Returns how many consecutive ranks of a node share a NIC."""
    return -(-topology.per_node // min(topology.nics, topology.per_node))


def _nics(topology: Topology, rank: Int64) -> Int64:
    """Returns how many NICs of a rank's node some rank of it uses."""
    return np.asarray(-(-_members(topology, rank) // _sharing(topology)), dtype=np.int64)


def _nic(topology: Topology, rank: Int64) -> Int64:
    """Returns a number for each rank's NIC, other ones on other nodes."""
    return np.asarray(topology.node(rank) * topology.per_node + rank % topology.per_node // _sharing(topology))


def _proxy(topology: Topology, rank: Int64, further: Int64) -> Int64:
    """Returns the rank of the same node that uses the NIC so many places further; 0 places: the rank itself."""
    first, place, sharing = topology.node(rank) * topology.per_node, rank % topology.per_node, _sharing(topology)
    nic = (place // sharing + further) % _nics(topology, rank)
    return first + np.minimum(nic * sharing + place % sharing, _members(topology, rank) - 1)
