"""Knows which ranks of a world share a node and how nodes are joined.

A process registers it once at start-up; strategies and planners ask where distance counts.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist


@dataclass(frozen=True)
class Links:
    """How fast the connections are that join the ranks.

    ``nics``: of one node, for messages to other nodes; with 1, every message goes straight. ``nic``, ``link``: bytes/s
    of one NIC, and of one rank's link inside a node.
    """

    nics: int = 1
    nic: float = 50e9
    link: float = 450e9


_nodes: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[int, ...]] = weakref.WeakKeyDictionary()
_links: weakref.WeakKeyDictionary[dist.ProcessGroup, Links] = weakref.WeakKeyDictionary()


def register_nodes(nodes: Sequence[int], links: Links | None = None) -> None:
    """Registers the number of the node that each rank of this process's world is on.

    All ranks register the same, once. A world in which nobody has done so is one node.
    """
    world = dist.group.WORLD
    assert world is not None and len(nodes) == dist.get_world_size(), "of every rank of an initialised world"
    assert world not in _nodes, "nodes are settled once"
    _nodes[world] = tuple(nodes)
    _links[world] = links or Links()


def node_of(rank: int) -> int:
    """Returns the node of a global rank."""
    world = dist.group.WORLD
    nodes = None if world is None else _nodes.get(world)
    return 0 if nodes is None else nodes[rank]


def links_of(ranks: Sequence[int]) -> Links:
    """Returns the connections of these global ranks, with their share of a node's NICs.

    The share is that of these ranks among the node's ranks, at least one NIC.
    """
    world = dist.group.WORLD
    links = None if world is None else _links.get(world)
    if world is None or links is None:
        return Links()
    members = Counter(_nodes[world])
    most = max(members[node_of(rank)] for rank in ranks)
    return replace(links, nics=max(1, links.nics * per_node(ranks) // most))


def per_node(ranks: Sequence[int]) -> int:
    """Returns the largest number such that each so many of these global ranks, counted from the first, share a node.

    Where ranks lie on their nodes in equal runs, the last one maybe shorter, it is the run's length. Otherwise it is
    less than some node has: what lies on two nodes is never taken for one, though one may be taken for several.
    """
    return _runs(tuple(node_of(rank) for rank in ranks))


@functools.cache
def _runs(nodes: tuple[int, ...]) -> int:
    size = next((place for place, node in enumerate(nodes) if node != nodes[0]), len(nodes))
    while any(len(set(nodes[first : first + size])) > 1 for first in range(0, len(nodes), size)):
        size -= 1
    return size
