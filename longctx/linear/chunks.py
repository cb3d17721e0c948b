"""Cuts a rank's tokens into chunks and says which of them see what: the part of a plan that local computing reads.

Each segment is cut into chunks of C tokens from its start. The last one is padded with tokens that write nothing and
let the state through. A document edge may lie anywhere in a chunk:

    same[i, j]   j is not after i, both in one document     what i reads of j directly
    head[i]      no document started in the chunk up to i   i reads the state that enters the chunk
    tail[j]      no document starts in the chunk after j    the state that leaves the chunk holds what j wrote
    keep         no document starts in the chunk            the state that enters leaves it too
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from longctx.linear.affine import Resets
from longctx.linear.segments import Chain, Segment, chain_of
from longctx.sequence import Documents, SequencePlan, view
from longctx.sequence.documents import Int64


@dataclass(frozen=True)
class Chunks:
    """The N chunks of C tokens that one rank holds; B' is B, or 1 where all batch rows are packed alike.

    ``runs``: half-open chunk ranges, one for each of the rank's segments. ``segment`` int64 ``[N]``: whose chunk it is.
    ``slots`` int64 ``[n]``: place of each valid local token among the N·C; ``token`` int64 ``[N·C]``: the inverse,
    ``shard`` (one past the last row) for places without a token. ``real`` bool ``[B', N, C]``: tokens of a document.
    ``same`` bool ``[B', N, C, C]``; ``head``, ``tail`` bool ``[B', N, C]``; ``keep`` bool ``[B', N]``. ``full``: are
    the tokens of the chunks the shard's, one after the other, and all of documents?

    ``starts``: does a document start in any chunk? ``mixed``: are there tokens of several documents in any? ``passes``
    bool ``[B', runs]``: whether a state passes through all of a run. ``resets``: of the chunks; ``unreached``: of those
    that a state which enters their run does not come to; ``run_resets``: of the runs.
    """

    shard: int
    full: bool
    runs: tuple[tuple[int, int], ...]
    segment: Tensor
    slots: Tensor
    token: Tensor
    real: Tensor
    same: Tensor
    head: Tensor
    tail: Tensor
    keep: Tensor
    passes: Tensor
    starts: bool
    mixed: bool
    resets: Resets | None
    unreached: Resets | None
    run_resets: Resets | None

    @property
    def count(self) -> int:
        return len(self.segment)

    @property
    def width(self) -> int:
        return self.same.shape[-1]

    def cut(self, tokens: Tensor) -> Tensor:
        """Cuts ``[B, T/SP, H, ...]`` into chunks ``[B, N, H, C, ...]``; 0 for what is not a token of a document."""
        if self.full:
            return tokens.unflatten(1, (self.count, self.width)).transpose(2, 3).contiguous()
        padded = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, 1))
        chunked = padded.index_select(1, self.token).unflatten(1, (self.count, self.width))
        real = self.real.view(*self.real.shape, *(1,) * (tokens.ndim - 2))
        return chunked.masked_fill(~real, 0).transpose(2, 3).contiguous()

    def join(self, chunked: Tensor) -> Tensor:
        """Joins chunks ``[B, N, H, C, ...]`` to ``[B, T/SP, H, ...]``; padding is 0."""
        tokens = chunked.transpose(2, 3).flatten(1, 2)
        if self.full:
            return tokens
        tokens = tokens.index_select(1, self.slots)
        return F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, self.shard - tokens.shape[1]))

    def to(self, device: torch.device) -> Chunks:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Resets)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Piece:
    """Chunks that are computed together: ``rows`` are the local rows of their tokens.

    ``chunks``: the chunks among these rows. What a piece has of a segment is a *span*; they are the runs of its chunks.
    """

    rows: slice
    chunks: Chunks

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the piece's rows of a tensor of tokens ``[B, T/SP, ...]``; a tensor of heads ``[H]`` stays whole."""
        return tensor if tensor.ndim == 1 else tensor[:, self.rows]


@dataclass(frozen=True)
class Pieces:
    """A rank's tokens, divided into pieces; ``runs`` are half-open ranges of spans, one for each of its segments.

    ``resets``: of the spans.
    """

    parts: tuple[Piece, ...]
    runs: tuple[tuple[int, int], ...]
    resets: Resets | None

    def split(self, spans: Tensor) -> tuple[Tensor, ...]:
        """Splits ``[B, spans, ...]`` by piece."""
        return spans.split([len(piece.chunks.runs) for piece in self.parts], 1)


@dataclass(frozen=True)
class ChunkGrid:
    """A layout of a rank's chunks that says which token lies where, int64 ``[N, C]`` each.

    ``position``: global, -1 for none. ``token``: the local row, or one past the shard. ``filled``: positions, and that
    of the chunk's last token where there is none. ``counts``: chunks of each segment.
    """

    counts: list[int]
    position: Int64
    token: Int64
    filled: Int64


def grid_of(segments: Sequence[Segment], shard: int, chunk: int) -> ChunkGrid:
    """Lays one rank's segments out, in order, as chunks of at most ``chunk`` tokens.

    Chunks are shorter where no segment is as long.
    """
    width = max(1, min(chunk, max((segment.tokens for segment in segments), default=1)))
    counts = [-(-segment.tokens // width) for segment in segments]
    ends = np.cumsum([0, *counts])
    position = np.full((ends[-1], width), -1, dtype=np.int64)  # global, -1 for no token
    token = np.full((ends[-1], width), shard, dtype=np.int64)
    for segment, first, last in zip(segments, ends[:-1], ends[1:], strict=True):
        position[first:last].reshape(-1)[: segment.tokens] = np.arange(segment.start, segment.stop)
        token[first:last].reshape(-1)[: segment.tokens] = np.arange(segment.first, segment.first + segment.tokens)
    filled = np.where(position >= 0, position, position.max(1, keepdims=True, initial=-1))
    return ChunkGrid(counts, position, token, filled)


def cut_chunks(segments: Sequence[Segment], documents: Sequence[Documents], shard: int, chunk: int) -> Chunks:
    """Cuts the segments of one rank into chunks, on the host."""
    grid = grid_of(segments, shard, chunk)
    # What pads a chunk belongs to the document of the chunk's last token: it keeps no state from leaving.
    position, filled = grid.position, grid.filled
    rows = distinct_packings(documents)
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
    full = bool(real.all()) and np.array_equal(grid.token.reshape(-1), np.arange(shard))
    passes, reached = _through(arrays["keep"], runs)
    return Chunks(
        shard,
        full,
        runs,
        **{name: torch.from_numpy(value) for name, value in arrays.items()},
        passes=passes,
        starts=not head.all(),
        mixed=bool((start != start[..., :1]).any()),
        resets=Resets.where_not(torch.from_numpy(arrays["keep"])),
        unreached=Resets.where_not(reached),
        run_resets=Resets.where_not(passes),
    )


def _through(keep: NDArray[np.bool_], runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Whether what enters each run leaves it, bool ``[B', runs]``, and whether it comes to each chunk, ``[B', N]``."""
    passes = np.stack([keep[:, start:stop].all(1) for start, stop in runs], 1) if runs else keep[:, :0]
    reached = np.ones_like(keep)
    for start, stop in runs:
        reached[:, start + 1 : stop] = np.logical_and.accumulate(keep[:, start : stop - 1], 1)
    return torch.from_numpy(passes), torch.from_numpy(reached)


def distinct_packings(documents: Sequence[Documents]) -> Sequence[Documents]:
    """Returns the packing of each row, or a single one where all rows are packed alike."""
    return documents[:1] if len(set(documents)) == 1 else documents


def cut_pieces(segments: Sequence[Segment], documents: Sequence[Documents], chunk: int, tokens: int) -> Pieces:
    """Cuts segments into pieces of whole chunks, of at most ``tokens`` tokens or one chunk."""
    most = max(1, tokens // chunk) * chunk
    parts: list[list[Segment]] = [[]]
    counts, free_tokens = [], most
    for segment in segments:
        before, start = sum(map(len, parts)), segment.start
        while start < segment.stop:
            if not free_tokens:
                parts.append([])
                free_tokens = most
            stop = min(segment.stop, start + free_tokens)
            parts[-1].append(replace(segment, start=start, stop=stop, first=segment.first + start - segment.start))
            free_tokens -= -(-(stop - start) // chunk) * chunk
            start = stop
        counts.append(sum(map(len, parts)) - before)
    ends = np.cumsum([0, *counts]).tolist()
    pieces = tuple(_piece(spans, documents, chunk) for spans in parts)
    resets = Resets.where_not(torch.cat([piece.chunks.passes for piece in pieces], 1))
    return Pieces(pieces, tuple(itertools.pairwise(ends)), resets)


def _piece(spans: Sequence[Segment], documents: Sequence[Documents], chunk: int) -> Piece:
    first = spans[0].first if spans else 0
    rows = slice(first, first + sum(span.tokens for span in spans))
    shifted = [replace(span, first=span.first - first) for span in spans]
    return Piece(rows, cut_chunks(shifted, documents, rows.stop - rows.start, chunk))


# Tokens of a piece, by kind of device, or all at once. Tensors of a piece stay in a core's cache, more or less. They
# also stay below 32 MiB: glibc's allocator gives larger ones back to the system after every use, page by page.
PIECE = {"cpu": 2048}


@view
def chunks_of(plan: SequencePlan, rank: int, chunk: int, device: torch.device) -> Chunks:
    """Returns a rank's chunks on ``device``, moved once.

    A copy from ordinary memory makes the host wait.
    """
    return cut_chunks(_segments(plan, rank), plan.documents, plan.shard, chunk).to(device)


def pieces_of(plan: SequencePlan, rank: int, chunk: int, device: torch.device) -> Pieces:
    """Returns a rank's pieces on ``device``, moved once."""
    return _pieces(plan, rank, chunk, PIECE.get(device.type, plan.length), device)


@view
def _pieces(plan: SequencePlan, rank: int, chunk: int, tokens: int, device: torch.device) -> Pieces:
    pieces = cut_pieces(_segments(plan, rank), plan.documents, chunk, tokens)
    parts = tuple(replace(piece, chunks=piece.chunks.to(device)) for piece in pieces.parts)
    return replace(pieces, parts=parts, resets=pieces.resets and pieces.resets.to(device))


def _segments(plan: SequencePlan, rank: int) -> list[Segment]:
    chain: Chain = chain_of(plan)
    return [chain.segments[place] for place in chain.places_of(rank)]
