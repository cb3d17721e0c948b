"""Queries that chose a block each, grouped by (block, head): dense pieces of work in a sparse choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype

TILE = 64  # queries of one (block, head) that are computed together
MAX_SCORES = 1 << 22  # cells of scores held at a time
NONE = -1  # a choice that was not made: a document's first queries have few blocks to choose from


@dataclass(frozen=True)
class QueryGroups:
    """Holds ``M`` groups of at most ``TILE`` queries, each of one (block, head).

    ``queries`` ``[M, TILE]``: n * H + h of query n in head h; the group's first again where there are fewer
    (``missing``). ``keys`` ``[M, b]``: j * H + h of the block's keys j. No query occurs twice in a head.
    """

    queries: Tensor
    missing: Tensor
    keys: Tensor

    def scores(self, q: Tensor, fetched: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scores ``[M, TILE, b]``, keys and values ``[M, b, D]``, in the accumulation dtype.

        q ``[1, n, H, D]``; fetched: keys and values beside one another, ``[1, m, H, 2 D]``.
        """
        wide = accumulation_dtype(q.dtype)
        keys, values = fetched.flatten(0, 2)[self.keys].to(wide).chunk(2, -1)
        return self.take(q).to(wide) @ keys.mT * scale, keys, values

    def take(self, x: Tensor) -> Tensor:
        """Takes the groups' rows ``[M, TILE, ...]`` of a tensor ``[1, n, H, ...]``."""
        return x.flatten(0, 2)[self.queries]

    def put(self, whole: Tensor, made: Tensor) -> None:
        """Writes rows of the groups' queries into a tensor ``[1, n, H, ...]``."""
        there = ~self.missing
        whole.flatten(0, 2)[self.queries[there]] = made[there]

    def add(self, whole: Tensor, made: Tensor) -> None:
        """Adds rows of the groups' queries to a tensor ``[1, n, H, ...]``."""
        there = ~self.missing
        whole.flatten(0, 2).index_add_(0, self.queries[there], made[there])

    def add_to_keys(self, whole: Tensor, made: Tensor) -> None:
        """Adds rows of the groups' keys to a tensor ``[1, m, H, ...]``."""
        whole.flatten(0, 2).index_add_(0, self.keys.flatten(), made.flatten(0, 1))


def grouped(choice: Tensor, firsts: Tensor, size: int) -> Iterator[QueryGroups]:
    """Yields groups of one choice of a block for each query ``[n, H]``, as many at a time as ``MAX_SCORES`` allows.

    ``firsts``: where each block's ``size`` keys begin among those that are here.
    """
    heads, device = choice.shape[1], choice.device
    queries = torch.nonzero(choice.flatten() != NONE)[:, 0]
    kinds, order = (choice.flatten()[queries].long() * heads + queries % heads).sort(stable=True)
    queries = queries[order]
    kinds, counts = torch.unique_consecutive(kinds, return_counts=True)
    pieces = (counts + TILE - 1) // TILE
    kind = torch.arange(len(kinds), device=device).repeat_interleave(pieces)
    number = torch.arange(len(kind), device=device) - (pieces.cumsum(0) - pieces)[kind]
    begin = ((counts.cumsum(0) - counts)[kind] + number * TILE)[:, None]
    cell = begin + torch.arange(TILE, device=device)
    missing = cell >= counts.cumsum(0)[kind][:, None]
    members = queries[torch.where(missing, begin, cell)]
    block, head = kinds[kind] // heads, kinds[kind] % heads
    keys = (firsts[block][:, None] + torch.arange(size, device=device)) * heads + head[:, None]
    step = max(1, MAX_SCORES // (TILE * size))
    for one in range(0, len(kind), step):
        some = slice(one, one + step)
        yield QueryGroups(members[some], missing[some], keys[some])
