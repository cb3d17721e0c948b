"""Layouts: which global positions each rank of the sequence group holds.

A layout is data. For a sequence length and a world size it yields every rank's positions in ascending order. Tiles,
plans and byte counts follow from those alone, so a new layout is this one function. Lengths need not divide by
anything: chunks differ by at most one token and ranks may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Protocol, cast, runtime_checkable

import numpy as np

from longctx.catalog import LAYOUTS
from longctx.errors import ConfigError
from longctx.rules import whole
from longctx.sequence.documents import Int64


@runtime_checkable
class Layout(Protocol):
    """Places tokens on ranks. Implementations are frozen (hashable): plans are cached by them."""

    @property
    def name(self) -> str: ...

    def __hash__(self) -> int: ...

    def positions(self, length: int, world: int, rank: int) -> Int64:
        """Returns the global positions of a rank's tokens, int64 ``[n_rank]``, ascending.

        All ranks together partition ``length``.
        """
        ...


def _chunk(length: int, chunks: int, index: int) -> Int64:
    """Chunk ``index`` of ``chunks`` nearly equal consecutive ones."""
    return np.arange(index * length // chunks, (index + 1) * length // chunks, dtype=np.int64)


@dataclass(frozen=True)
class Contiguous:
    """Places the r-th of P consecutive chunks on rank r (Ring Attention, Liu et al. 2023)."""

    name = "contiguous"

    def positions(self, length: int, world: int, rank: int) -> Int64:
        return _chunk(length, world, rank)


@dataclass(frozen=True)
class Zigzag:
    """Places chunks r and 2P-1-r of 2P on rank r, so that causal work is equal on all ranks.

    Source: Llama 3, ring-flash-attention.
    """

    name = "zigzag"

    def positions(self, length: int, world: int, rank: int) -> Int64:
        return np.concatenate([_chunk(length, 2 * world, rank), _chunk(length, 2 * world, 2 * world - 1 - rank)])


@dataclass(frozen=True)
class Striped:
    """Deals blocks of ``block`` tokens to ranks in turn.

    Striped Attention (Brandon et al. 2023) has block 1.
    """

    block: int = 1
    name = "striped"

    def __post_init__(self) -> None:
        if whole("attention.layout_block", self.block) < 1:
            raise ConfigError(f"attention.layout_block {self.block} must be at least 1 token; 1 is the paper's form")

    def positions(self, length: int, world: int, rank: int) -> Int64:
        firsts = np.arange(rank * self.block, length, world * self.block, dtype=np.int64)
        positions = (firsts[:, None] + np.arange(self.block, dtype=np.int64)).reshape(-1)
        return positions[positions < length]


@dataclass(frozen=True)
class Explicit:
    """Places spans ``(start, stop)`` by rank, as planners produce them.

    Each rank's spans ascend; together they partition the sequence.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]
    name = "explicit"

    def __post_init__(self) -> None:
        end = 0
        for bound in (bound for rank in self.spans for span in rank for bound in span):
            whole("bound of a span", bound, 0)
        for start, stop in sorted(span for rank in self.spans for span in rank):
            if start != end or stop <= start:
                raise ConfigError(
                    f"spans must partition the sequence: [{start}, {stop}) follows position {end}; "
                    f"it must start at {end} and hold at least one token"
                )
            end = stop
        for rank, spans in enumerate(self.spans):
            if list(spans) != sorted(spans):
                raise ConfigError(f"spans of rank {rank} must ascend, got {spans}; sort them")

    def positions(self, length: int, world: int, rank: int) -> Int64:
        total = sum(stop - start for spans in self.spans for start, stop in spans)
        if (world, length) != (len(self.spans), total):
            raise ConfigError(
                f"explicit layout is for {len(self.spans)} ranks and {total} tokens, not {world} and {length}"
            )
        parts = [np.arange(start, stop, dtype=np.int64) for start, stop in self.spans[rank]]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Joined:
    """Places on one rank what a row of ``inner`` neighbouring ranks holds together under another layout.

    Rank i has the tokens of ranks ``i * inner ..``, in order of position. All ranks joined are one that holds the whole
    sequence.
    """

    layout: Layout
    inner: int
    name = "joined"

    def positions(self, length: int, world: int, rank: int) -> Int64:
        ranks = range(rank * self.inner, (rank + 1) * self.inner)
        return np.sort(np.concatenate([self.layout.positions(length, world * self.inner, r) for r in ranks]))


def make_layout(name: str, block: int = 1) -> Layout:
    """Makes the layout of that name. Raises ``ConfigError``.

    ``block``: of layouts that have one.
    """
    kind = LAYOUTS.load(name)
    if not is_dataclass(cast(object, kind)):
        raise ConfigError(f"layout {name} is {kind.__name__}, which must be a frozen dataclass")
    if any(one.name == "block" for one in fields(kind)):
        return cast(Layout, kind(block))
    if block != 1:
        raise ConfigError(f"attention.layout_block {block} applies to the striped layout, not to {name}; leave it at 1")
    return cast(Layout, kind())


@lru_cache(maxsize=16)
def positions_by_rank(layout: Layout, length: int, world: int) -> tuple[Int64, ...]:
    """Returns the positions of every rank, after checking that they are a partition of ``length`` tokens.

    Kept, as all batches of a run ask for the same. Raises ``ConfigError``, for an attention over shards that overlap or
    have holes is wrong without a sign.
    """
    whole("world", world, 1)
    whole("length of the sequence", length, 0)
    shards = tuple(layout.positions(length, world, rank) for rank in range(world))
    where = f"layout {layout.name} of {length} tokens on {world} ranks"
    for rank, shard in enumerate(shards):
        if not (isinstance(shard, np.ndarray) and shard.dtype == np.int64 and shard.ndim == 1):
            kind = f"{shard.dtype} of {shard.ndim} dims" if isinstance(shard, np.ndarray) else type(shard).__name__
            raise ConfigError(f"{where}: positions of rank {rank} must be a NumPy array of int64, [n], got {kind}")
        if (np.diff(shard) < 1).any():
            at = int(np.flatnonzero(np.diff(shard) < 1)[0])
            raise ConfigError(f"{where}: positions of rank {rank} must ascend, got {shard[at]} before {shard[at + 1]}")
        if len(shard) and not 0 <= shard[0] <= shard[-1] < length:
            raise ConfigError(
                f"{where}: positions of rank {rank} must lie in [0, {length}), got {shard[0]}..{shard[-1]}"
            )
    holders = np.bincount(np.concatenate(shards), minlength=length)
    if (holders != 1).any():
        position = int(np.flatnonzero(holders != 1)[0])
        raise ConfigError(f"{where}: position {position} is on {holders[position]} ranks, and must be on exactly one")
    return shards


def shard_length(layout: Layout, length: int, world: int, multiple: int = 1) -> int:
    """Returns the physical tokens per rank: the longest shard, rounded up to ``multiple`` (the tensor-parallel degree).

    It is a constant of the run; only the valid lengths inside it vary by rank.
    """
    longest = max(map(len, positions_by_rank(layout, length, world)))
    whole("multiple of the shard's length", multiple, 1)
    return max(1, -(-longest // multiple)) * multiple
