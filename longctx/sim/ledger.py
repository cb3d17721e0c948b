"""Counts the bytes that ranks send, by operation and edge.

The conventions are for a group of P ranks and n bytes per rank. Edges are global ranks; a rank's own data never
counts; "next" is the following member of the group, cyclically.

=================  =========================================  ==================================
operation          bytes that one rank sends                  edge
=================  =========================================  ==================================
send               n                                          to the receiver
all_gather         (P-1) n, n the rank's input                ring, to next
reduce_scatter     (P-1)/P n, n the rank's whole input        ring, to next
all_reduce         2 (P-1)/P n, n the tensor                  ring, to next
broadcast          n, the last rank of the chain 0            chain that starts at the root
reduce             n, the root 0                              chain that ends at the root
all_to_all         the split for each other rank              direct
gather             n, the root 0                              direct, to the root
scatter            the root: n for each other rank            direct, from the root
barrier            0
=================  =========================================  ==================================

Unequal blocks (lists of tensors) are counted exactly: in an all_gather everything but the next rank's own
block, in a reduce_scatter everything but one's own. An all_reduce that doesn't divide by P is rounded down to
a whole byte. These are the least bytes of bandwidth-optimal algorithms. What a real library sends may be more:
Gloo's reduce_scatter sends twice this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

Sent = list[tuple[int, int]]  # (group rank of the receiver, bytes)


def all_gather_bytes(rank: int, blocks: Sequence[int]) -> Sent:
    """Returns what ``rank`` sends in an all-gather; ``blocks`` are the bytes of each rank's input."""
    following = (rank + 1) % len(blocks)
    return [(following, sum(blocks) - blocks[following])]


def reduce_scatter_bytes(rank: int, blocks: Sequence[int]) -> Sent:
    """Returns what ``rank`` sends in a reduce-scatter; ``blocks`` are the bytes that each rank receives."""
    return [((rank + 1) % len(blocks), sum(blocks) - blocks[rank])]


def all_reduce_bytes(rank: int, size: int, nbytes: int) -> Sent:
    """Returns what ``rank`` sends in an all-reduce of ``nbytes`` bytes in all."""
    return [((rank + 1) % size, 2 * (size - 1) * nbytes // size)]


def broadcast_bytes(rank: int, size: int, root: int, nbytes: int) -> Sent:
    """Returns what ``rank`` sends in a broadcast along the chain root, root + 1, ..., root - 1."""
    following = (rank + 1) % size
    return [] if following == root else [(following, nbytes)]


def reduce_bytes(rank: int, size: int, root: int, nbytes: int) -> Sent:
    """Returns what ``rank`` sends in a reduction along the chain root + 1, root + 2, ..., root."""
    return [] if rank == root else [((rank + 1) % size, nbytes)]


class Ledger:
    """Counts the bytes that ranks send; the module's text states the conventions."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, int, int], int] = defaultdict(int)

    def add(self, operation: str, source: int, sent: Iterable[tuple[int, int]]) -> int:
        """Counts ``sent`` pairs (global rank of the receiver, bytes); returns the bytes counted."""
        total = 0
        for destination, nbytes in sent:
            if destination != source and nbytes:
                self._bytes[operation, source, destination] += nbytes
                total += nbytes
        return total

    def sent(self, rank: int) -> int:
        """Returns the bytes that this global rank sent."""
        return sum(nbytes for (_, source, _), nbytes in self._bytes.items() if source == rank)

    def by_edge(self, operation: str | None = None) -> dict[tuple[int, int], int]:
        """Returns the bytes of each (sender, receiver), of one operation or of all.

        Edges without traffic are absent.
        """
        totals: dict[tuple[int, int], int] = defaultdict(int)
        for (name, source, destination), nbytes in self._bytes.items():
            if operation is None or operation == name:
                totals[source, destination] += nbytes
        return dict(totals)

    def by_operation(self, rank: int | None = None) -> dict[str, int]:
        """Returns the bytes of each operation, sent by one rank or by all.

        Operations without traffic are absent.
        """
        totals: dict[str, int] = defaultdict(int)
        for (operation, source, _), nbytes in self._bytes.items():
            if rank is None or rank == source:
                totals[operation] += nbytes
        return dict(totals)

    def total(self) -> int:
        """Returns all bytes sent."""
        return sum(self._bytes.values())

    def reset(self) -> None:
        """Forgets everything counted so far; rank code may call it too, for instance after warm-up."""
        self._bytes.clear()
