"""Zeppelin (2025) puts each document on one device (z0), on a ring in a node (z1) or across nodes (z2).

Its home layout is attention's own, so queries stay and only KV of rings moves. The linear layers then want equal
tokens, which ``remap`` moves there and back. Reconstructed from the paper; there is no public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longctx.planner.cost import Topology
from longctx.planner.document_placement import DocumentPlacement, from_rows, zigzag_spans
from longctx.planner.options import PlannerOptions
from longctx.planner.slices import Int64, MaskSlices
from longctx.planner.tasks import TaskRuns


@dataclass(frozen=True)
class Zones:
    """Which ranks hold each document: its zone and the members of its ring.

    ``members``: the ranks of each document's ring, in order; ``zone``: 0, 1 or 2 of each document.
    """

    members: tuple[tuple[int, ...], ...]
    zone: tuple[int, ...]


def zeppelin(home: DocumentPlacement, mask: MaskSlices, topology: Topology, options: PlannerOptions) -> TaskRuns:
    """Computes rows where ``zone_layout`` has them. Reads ``capacity``.

    Queries move only where ``home`` is another layout than ``zone_layout``.
    """
    return TaskRuns.between(home, zone_layout(home.lengths, topology, options))


def zone_layout(lengths: Int64, topology: Topology, options: PlannerOptions) -> DocumentPlacement:
    """Returns where attention wants the tokens: whole documents, or zigzag over the ring of their zone."""
    rows, turn = [], 0
    for doc, (length, members) in enumerate(zip(lengths.tolist(), zones(lengths, topology, options).members)):
        placed, turn = zigzag_spans(length, members, turn)
        rows += [(rank, doc, start, stop) for rank, start, stop in placed]
    return from_rows(lengths, topology.servers, rows)


def zones(lengths: Int64, topology: Topology, options: PlannerOptions) -> Zones:
    """Assigns documents to zones: to nodes first, then to the ranks inside each node, by the same rule."""
    device = max(1, -(-int(lengths.sum() * options.capacity) // topology.servers))
    ranks = [
        list(range(first, min(first + topology.per_node, topology.servers)))
        for first in range(0, topology.servers, topology.per_node)
    ]
    docs = list(range(len(lengths)))
    sizes = lengths.tolist()
    across = _partition(docs, sizes, [0.0] * len(ranks), [0.0] * len(ranks), [device * len(node) for node in ranks])
    members: list[tuple[int, ...]] = [()] * len(docs)
    zone = [0] * len(docs)
    tokens, work = [0.0] * topology.servers, [0.0] * topology.servers
    for doc, nodes in enumerate(across):
        if len(nodes) > 1:
            members[doc], zone[doc] = tuple(rank for node in nodes for rank in ranks[node]), 2
            for rank in members[doc]:
                tokens[rank] += sizes[doc] / len(members[doc])
                work[rank] += sizes[doc] ** 2 / len(members[doc])
    for node, own in enumerate(ranks):
        here = [doc for doc in docs if across[doc] == (node,)]
        inside = _partition(
            here, sizes, [tokens[rank] for rank in own], [work[rank] for rank in own], [device] * len(own)
        )
        for doc, places in zip(here, inside, strict=True):
            members[doc], zone[doc] = tuple(own[place] for place in places), int(len(places) > 1)
    return Zones(tuple(members), tuple(zone))


def _partition(
    docs: Sequence[int], sizes: Sequence[int], tokens: list[float], work: list[float], capacity: Sequence[float]
) -> list[tuple[int, ...]]:
    """Returns the bins of each document: one, or several for documents of at least the threshold.

    The threshold begins at a bin's capacity. Longest first, each document goes to the bin of least quadratic work.
    Where its tokens overflow a bin, the threshold falls to the next longest document and all begins again.
    """
    order = sorted(docs, key=lambda doc: (-sizes[doc], doc))
    levels = sorted({sizes[doc] for doc in docs if sizes[doc] < capacity[0]}, reverse=True)
    for threshold in [capacity[0], *levels]:
        bin_tokens, load = list(tokens), list(work)
        chosen: dict[int, tuple[int, ...]] = {}
        for doc in order:
            size = sizes[doc]
            ways = min(len(bin_tokens), max(2, -(-size // int(capacity[0])))) if size >= threshold else 1
            bins = sorted(range(len(bin_tokens)), key=lambda place: (load[place], place))[:ways]
            for place in bins:
                bin_tokens[place] += size / len(bins)
                load[place] += size * size / len(bins)
            chosen[doc] = tuple(sorted(bins))
        if len(bin_tokens) == 1 or all(have <= most for have, most in zip(bin_tokens, capacity, strict=True)):
            break
    return [chosen[doc] for doc in docs]


def route(volume: float, topology: Topology) -> tuple[int, float]:
    """Returns how many NICs to use for ``volume`` bytes between two nodes, and the seconds that they take.

    One hop uses one NIC. Scattered over x proxies of the node it uses x and pays the links twice:
    ``V / (x nic) + 2 V (x - 1) / (x link)``. x is 1 where nothing is faster.
    """
    ways = range(1, min(topology.nics, topology.per_node) + 1)
    times = [volume / (x * topology.nic) + 2 * volume * (x - 1) / (x * topology.link) for x in ways]
    best = int(np.argmin(times))
    return best + 1, times[best]


@dataclass(frozen=True)
class Remap:
    """Tokens that change ranks between attention and linear layers: int64 columns ``[N]``, by source.

    Tokens ``[start, start + count)`` of ``source``'s resident ones go to ``dest``; one all-to-all there, its transpose
    back. Bytes: ``count * hidden * element`` each way, twice a layer in each pass.
    """

    source: Int64
    dest: Int64
    start: Int64
    count: Int64


def remap(tokens: Int64, topology: Topology) -> Remap:
    """Returns the moves that give all ranks equal tokens, from ``tokens`` of each: inside nodes first, then across.

    The slowest rank decides, and links across nodes are slow. Of a node's surplus, what leaves the node is levelled
    over its ranks; so is what comes into a node.
    """
    ranks = len(tokens)
    total = int(tokens.sum())
    target = np.diff([rank * total // ranks for rank in range(ranks + 1)])
    surplus, deficit = np.maximum(tokens - target, 0), np.maximum(target - tokens, 0)
    node = topology.node(np.arange(ranks))
    rows: list[tuple[int, int, int]] = []
    for number in range(topology.nodes):
        own = np.flatnonzero(node == number)
        amount = int(min(surplus[own].sum(), deficit[own].sum()))
        give, take = _tops(surplus[own], amount), _tops(deficit[own], amount)
        rows += _matched(own, give, own, take)
        surplus[own] -= give
        deficit[own] -= take
    everyone = np.arange(ranks)
    rows += _matched(everyone, surplus, everyone, deficit)
    table = np.array(sorted(rows), dtype=np.int64).reshape(-1, 3)
    source, dest, count = table.T
    sent = np.bincount(source, weights=count, minlength=ranks).astype(np.int64)
    before = np.cumsum(count) - count
    first = before - (np.cumsum(sent) - sent)[source]
    return Remap(source, dest, tokens[source] - sent[source] + first, count)


def _tops(amounts: Int64, total: int) -> Int64:
    """Returns ``total`` taken off the largest amounts, so that the largest that stays is as small as it can be."""
    low, high = 0, int(amounts.max(initial=0))
    while low < high:
        level = (low + high) // 2
        low, high = (level + 1, high) if np.maximum(amounts - level, 0).sum() > total else (low, level)
    taken = np.maximum(amounts - low, 0)
    rest = total - int(taken.sum())
    more = np.flatnonzero(amounts >= low)[:rest] if low else amounts[:0]
    taken[more] += 1
    return taken


def _matched(sources: Int64, give: Int64, dests: Int64, take: Int64) -> list[tuple[int, int, int]]:
    """Returns (source, destination, count), both sides in order."""
    ends_give, ends_take = np.cumsum(give), np.cumsum(take)
    edges = np.unique(np.concatenate([[0], ends_give, ends_take]))
    if len(edges) < 2:
        return []
    begins = edges[:-1]
    source = sources[np.searchsorted(ends_give, begins, "right")]
    dest = dests[np.searchsorted(ends_take, begins, "right")]
    return list(zip(source.tolist(), dest.tolist(), np.diff(edges).tolist(), strict=True))
