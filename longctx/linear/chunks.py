"""A rank's tokens in chunks, and which of them see what: the part of a plan that local computing reads.

Each segment is cut into chunks of C tokens from its start; the last one is padded with tokens that write nothing and
let the state through. A document edge may lie anywhere in a chunk:

    same[i, j]   j is not after i, both in one document     what i reads of j directly
    head[i]      no document started in the chunk up to i   i reads the state that enters the chunk
    tail[j]      no document starts in the chunk after j    the state that leaves the chunk holds what j wrote
    keep         no document starts in the chunk            the state that enters leaves it too
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.linear.segments import Chain, Segment, chain_of
from longctx.sequence import Documents, SequencePlan
from longctx.sequence.documents import Int64


@dataclass(frozen=True)
class Chunks:
    """N chunks of C tokens on one rank. B' is B, or 1 where all batch rows are packed alike.

    ``runs``: half-open chunk ranges, one for each of the rank's segments. ``segment`` int64 ``[N]``: whose chunk it is.
    ``slots`` int64 ``[n]``: place of each valid local token among the N·C; ``token`` int64 ``[N·C]``: the inverse,
    ``shard`` (one past the last row) for places without a token. ``real`` bool ``[B', N, C]``: tokens of a document.
    ``same`` bool ``[B', N, C, C]``; ``head``, ``tail`` bool ``[B', N, C]``; ``keep`` bool ``[B', N]``.
    """

    shard: int
    runs: tuple[tuple[int, int], ...]
    segment: Tensor
    slots: Tensor
    token: Tensor
    real: Tensor
    same: Tensor
    head: Tensor
    tail: Tensor
    keep: Tensor

    @property
    def count(self) -> int:
        return len(self.segment)

    @property
    def width(self) -> int:
        return self.same.shape[-1]

    def cut(self, tokens: Tensor) -> Tensor:
        """``[B, T/SP, H, ...]`` to ``[B, N, H, C, ...]``; 0 for what is not a token of a document."""
        padded = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, 1))
        chunked = padded.index_select(1, self.token).unflatten(1, (self.count, self.width))
        real = self.real.view(*self.real.shape, *(1,) * (tokens.ndim - 2))
        return chunked.masked_fill(~real, 0).transpose(2, 3)

    def join(self, chunked: Tensor) -> Tensor:
        """``[B, N, H, C, ...]`` to ``[B, T/SP, H, ...]``; padding is 0."""
        tokens = chunked.transpose(2, 3).flatten(1, 2).index_select(1, self.slots)
        return F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, self.shard - tokens.shape[1]))

    def to(self, device: torch.device) -> Chunks:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Chunks(self.shard, self.runs, **moved)


@dataclass(frozen=True)
class Grid:
    """Chunks as places: global ``position`` int64 ``[N, C]``, -1 for none; ``token``, the local row, or one past the
    shard. ``filled``: positions, that of the chunk's last token where there is none."""

    counts: list[int]
    position: Int64
    token: Int64
    filled: Int64


def grid_of(segments: Sequence[Segment], shard: int, chunk: int) -> Grid:
    """Chunks of at most ``chunk`` tokens of one rank's segments, in order; narrower where no segment is as long."""
    width = max(1, min(chunk, max((segment.tokens for segment in segments), default=1)))
    counts = [-(-segment.tokens // width) for segment in segments]
    ends = np.cumsum([0, *counts])
    position = np.full((ends[-1], width), -1, dtype=np.int64)  # global, -1 for no token
    token = np.full((ends[-1], width), shard, dtype=np.int64)
    for segment, first, last in zip(segments, ends[:-1], ends[1:], strict=True):
        position[first:last].reshape(-1)[: segment.tokens] = np.arange(segment.start, segment.stop)
        token[first:last].reshape(-1)[: segment.tokens] = np.arange(segment.first, segment.first + segment.tokens)
    filled = np.where(position >= 0, position, position.max(1, keepdims=True, initial=-1))
    return Grid(counts, position, token, filled)


def cut_chunks(segments: Sequence[Segment], documents: Sequence[Documents], shard: int, chunk: int) -> Chunks:
    grid = grid_of(segments, shard, chunk)
    # What pads a chunk belongs to the document of the chunk's last token: it keeps no state from leaving.
    position, filled = grid.position, grid.filled
    rows = distinct(documents)
    start = np.stack([row.bounds_of(filled)[0] for row in rows])  # [B', N, C], of each token's document
    real = np.stack([(position >= 0) & (position < row.length) for row in rows])
    same = (start[..., :, None] == start[..., None, :]) & np.tri(position.shape[1], dtype=bool)
    head = start < filled[:, :1]
    tail = start == start[..., -1:]
    arrays = {
        "segment": np.repeat(np.arange(len(segments)), grid.counts),
        "slots": np.flatnonzero(position.reshape(-1) >= 0),
        "token": grid.token.reshape(-1),
        "real": real,
        "same": same,
        "head": head,
        "tail": tail,
        "keep": (head & tail).any(-1),
    }
    ends = np.cumsum([0, *grid.counts]).tolist()
    runs = tuple(itertools.pairwise(ends))
    return Chunks(shard, runs, **{name: torch.from_numpy(value) for name, value in arrays.items()})


def distinct(documents: Sequence[Documents]) -> Sequence[Documents]:
    """One row's packing for all where they are packed alike."""
    return documents[:1] if len(set(documents)) == 1 else documents


_Key = tuple[int, int, torch.device]
_chunks: weakref.WeakKeyDictionary[SequencePlan, dict[_Key, Chunks]] = weakref.WeakKeyDictionary()


def chunks_of(plan: SequencePlan, rank: int, chunk: int, device: torch.device) -> Chunks:
    """Made at first use and moved once, for a copy from ordinary memory makes the host wait."""
    made = _chunks.setdefault(plan, {})
    key = (rank, chunk, device)
    if key not in made:
        chain: Chain = chain_of(plan)
        segments = [chain.segments[place] for place in chain.own(rank)]
        made[key] = cut_chunks(segments, plan.documents, plan.shard, chunk).to(device)
    return made[key]
