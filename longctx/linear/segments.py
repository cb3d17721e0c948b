"""Knows which rank holds which part of the sequence: the chain of segments along which a state passes.

A segment is a maximal run of neighbouring global positions that one rank holds. Contiguous shards are one segment,
zigzag shards two, striped shards one a block; documents, padding and empty ranks do not change that. All segments
in order of position are the chain. A document that starts inside a segment cuts the chain there (``keep``). So what
a segment reads is one stretch of the chain before it, known from the plan on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from longctx.sequence import Documents, SequencePlan, view
from longctx.sequence.documents import Int64

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Segment:
    """A run of global positions ``[start, stop)`` that ``rank`` holds in local rows ``[first, first + tokens)``."""

    rank: int
    start: int
    stop: int
    first: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


class Chain:
    """All segments of a plan, which lie in order of position; their index is their place in the chain."""

    def __init__(self, positions: Sequence[Int64], documents: Sequence[Documents]) -> None:
        """``positions``: ascending global ones of each rank's valid tokens."""
        self.world = len(positions)
        self.segments = tuple(
            sorted(
                (segment for rank, positions_held in enumerate(positions) for segment in _runs(rank, positions_held)),
                key=lambda segment: segment.start,
            )
        )
        self._documents = tuple(documents)

    def __len__(self) -> int:
        return len(self.segments)

    @cached_property
    def _own(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(place for place, segment in enumerate(self.segments) if segment.rank == rank)
            for rank in range(self.world)
        )

    def places_of(self, rank: int) -> tuple[int, ...]:
        """Returns the places of a rank's segments, ascending, which is the order of its local rows too."""
        return self._own[rank]

    @cached_property
    def tokens(self) -> Int64:
        """Tokens of each segment, int64 ``[G]``."""
        return np.array([segment.tokens for segment in self.segments], dtype=np.int64)

    @cached_property
    def _first_document(self) -> Int64:
        """``[B, G]``: where the document of each segment's first token starts; padding starts at itself."""
        starts = np.array([segment.start for segment in self.segments], dtype=np.int64)
        return np.stack([row.bounds_of(starts)[0] for row in self._documents])

    @cached_property
    def enters(self) -> Bool:
        """Whether a document reaches into each segment from before it, bool ``[B, G]``."""
        starts = np.array([segment.start for segment in self.segments], dtype=np.int64)
        return self._first_document < starts

    @cached_property
    def keep(self) -> Bool:
        """Whether what enters each segment also leaves it, bool ``[B, G]``.

        It does where no document starts or ends inside.
        """
        rows = []
        for row, first in zip(self._documents, self._first_document, strict=True):
            last, _ = row.bounds_of(np.array([segment.stop - 1 for segment in self.segments], dtype=np.int64))
            rows.append(last == first)
        return np.stack(rows) & self.enters

    @cached_property
    def reads(self) -> Int64:
        """The first segment whose summary each segment reads, int64 ``[G]``.

        Segment g reads the summaries of those from ``reads[g]`` to g - 1; it is g itself if there is none.
        """
        stops = np.array([segment.stop for segment in self.segments], dtype=np.int64)
        places = np.arange(len(self), dtype=np.int64)
        first = np.searchsorted(stops, self._first_document, side="right")
        return np.where(self.enters, first, places).min(0) if len(self) else places

    def sent(self, owner: int, reader: int) -> tuple[int, ...]:
        """Returns the segments of ``owner`` that some segment of ``reader`` reads."""
        return tuple(
            place
            for place in self.places_of(owner)
            if any(self.reads[its] <= place < its for its in self.places_of(reader))
        )

    def returned(self, reader: int, owner: int) -> tuple[int, ...]:
        """Returns the segments of ``reader`` that read some segment of ``owner``: their gradients go there."""
        return tuple(
            its
            for its in self.places_of(reader)
            if any(self.reads[its] <= place < its for place in self.places_of(owner))
        )

    def crossed(self, place: int) -> bool:
        """Returns whether a state passes from the segment before into this one."""
        return place < len(self) and bool(self.reads[place] < place)

    def joined(self, places: Sequence[int]) -> Bool:
        """Returns whether the document that enters each place reaches back to the place before it, ``[B, n]``.

        ``places`` ascend. It then reaches over all that lie between the two in the chain. Never so for the first.
        """
        chosen = np.array(places, dtype=np.int64)
        stops = np.array([self.segments[place].stop for place in places], dtype=np.int64)
        found = self.enters[:, chosen]
        found[:, 1:] &= self._first_document[:, chosen[1:]] < stops[:-1]
        found[:, :1] = False
        return found


def _runs(rank: int, positions_held: Int64) -> list[Segment]:
    if not len(positions_held):
        return []
    edges = np.concatenate([[0], np.flatnonzero(np.diff(positions_held) != 1) + 1, [len(positions_held)]])
    return [
        Segment(rank, int(positions_held[first]), int(positions_held[last - 1]) + 1, first)
        for first, last in itertools.pairwise(edges.tolist())
    ]


@view
def chain_of(plan: SequencePlan) -> Chain:
    """Returns the plan's chain of segments."""
    return Chain([plan.positions(rank) for rank in range(plan.world)], plan.documents)
