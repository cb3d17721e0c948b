"""Blocks of equal size that count from the start of each document: MoBA's blocks, RAT's chunks.

The rows of a batch lie one after another here: the token at position p of row b has the *place* b * S + p. So rows
with different documents need no case of their own. Padding has places too, but is in no block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longctx.attention.runtime.borders import require_operands
from longctx.errors import ConfigError
from longctx.sequence import Documents, SequencePlan
from longctx.sequence.documents import Int64


@dataclass(frozen=True, eq=False)
class Blocks:
    """Lists all blocks of a batch in order; only a document's last block may be shorter than ``size``.

    Each int64 ``[N]``. ``starts``: first places; ``stops``: places after the last tokens; ``first``: the number of the
    first block of its document.
    """

    starts: Int64
    stops: Int64
    first: Int64

    def of(self, places: Int64) -> Int64:
        """Returns the number of the block of each place; none of them may be padding."""
        return np.searchsorted(self.starts, places, side="right") - 1

    @property
    def followed(self) -> Int64:
        """Returns the numbers of the blocks that later blocks of their document follow; these are complete."""
        return np.flatnonzero(np.append(self.first[1:] == self.first[:-1], False)[: len(self.first)])

    def places(self, blocks: Int64, stops: Int64) -> Int64:
        """Returns all places of these blocks, each up to a stop of its own."""
        lengths = stops - self.starts[blocks]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.starts[blocks], lengths) + within


def require_alike(q: Tensor, *others: Tensor) -> None:
    """Refuses anything but tensors ``[B, T/SP, H, D]`` that are alike: there is a key head for each query head."""
    for other in others:
        require_operands(q, other, other)
        if other.shape != q.shape:
            raise ConfigError(
                f"q {tuple(q.shape)} and {tuple(other.shape)} must have as many heads: sparse layers share no keys"
            )


@lru_cache(maxsize=16)
def blocks_of(documents: tuple[Documents, ...], length: int, size: int) -> Blocks:
    """Returns the blocks of packed documents.

    ``length``: tokens of each row, padding included. ``size``: tokens of a block.
    """
    begins = np.concatenate([row * length + one.cu_seqlens[:-1] for row, one in enumerate(documents)])
    lengths = np.concatenate([one.lengths for one in documents])
    counts = -(-lengths // size)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    number = np.arange(counts.sum()) - first
    starts = np.repeat(begins, counts) + number * size
    return Blocks(starts, np.minimum(starts + size, np.repeat(begins + lengths, counts)), first)


@dataclass(frozen=True, eq=False)
class Shard:
    """Packs the tokens of a rank without padding.

    ``places``: theirs, ascending; ``rows``: where they lie among the local tokens.
    """

    places: Int64
    rows: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """Packs the valid tokens of ``[B, T/SP, ...]`` into ``[1, n, ...]``."""
        return x.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Unpacks ``[1, n, ...]`` into ``[B, T/SP, ...]`` of the dtype and leading sizes of ``like``."""
        out = packed.new_zeros(like.shape[0] * like.shape[1], *packed.shape[2:], dtype=like.dtype)
        out.index_copy_(0, self.rows, packed[0].to(like.dtype))
        return out.unflatten(0, like.shape[:2])


def shard_of(plan: SequencePlan, rank: int, device: torch.device) -> Shard:
    """Returns the valid tokens of a rank, with indices on ``device``."""
    own = plan.positions(rank)
    held = np.concatenate([own[own < row.length] + number * plan.length for number, row in enumerate(plan.documents)])
    rows = np.concatenate(
        [np.flatnonzero(own < row.length) + number * plan.shard for number, row in enumerate(plan.documents)]
    )
    return Shard(held, torch.from_numpy(rows).to(device))
