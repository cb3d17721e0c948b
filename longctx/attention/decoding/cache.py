"""The key/value cache of a sequence that is being generated, sharded over the ranks of its group.

A token's keys and values lie on one rank, in all layers. Which one follows from counts that every rank keeps for
itself, so that nothing is asked or sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.comm import Group
from longctx.errors import ConfigError
from longctx.rules import whole
from longctx.sequence import Documents, Mask, SequencePlan, TileSet
from longctx.sequence.documents import Int64
from longctx.sequence.tiles import group_rows, tiles_of


class KeyValueShard:
    """Holds one layer's keys and values of the tokens of this rank, by ascending position.

    Its memory doubles when it is full, so that a new token costs no copy of the old ones. Where old ones are dropped,
    it stays within twice what is kept.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # [2, B, capacity, Hkv/TP, D]
        self._start = self._stop = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Appends keys and values of new tokens.

        k and v ``[B, n, Hkv/TP, D]``, of tokens after all those that are here; n may be 0.
        """
        buffer = self._buffer
        if buffer is not None and (buffer.shape[1], buffer.shape[3:], buffer.dtype) != (len(k), k.shape[2:], k.dtype):
            raise ConfigError(
                f"keys {tuple(k.shape)} of {k.dtype} do not go on those that are kept, {tuple(buffer.shape[1:])} of "
                f"{buffer.dtype}; a cache is of one batch, one layer and one dtype"
            )
        if buffer is None or buffer.shape[2] < self._stop + k.shape[1]:
            kept = self._stop - self._start
            length = kept + k.shape[1]
            grown = k.new_empty(2, k.shape[0], length if buffer is None else max(length, 2 * kept), *k.shape[2:])
            if buffer is not None:
                grown[:, :, :kept] = buffer[:, :, self._start : self._stop]
            self._buffer, self._start, self._stop = grown, 0, kept
        assert self._buffer is not None, "it has just been made"
        stop = self._stop + k.shape[1]
        self._buffer[0, :, self._stop : stop] = k
        self._buffer[1, :, self._stop : stop] = v
        self._stop = stop

    def drop(self, tokens: int) -> None:
        """Forgets so many of the earliest tokens."""
        self._start += tokens

    @property
    def keys(self) -> Tensor:
        """Returns a view of the keys, ``[B, n, Hkv/TP, D]``."""
        return self._rows()[0]

    @property
    def values(self) -> Tensor:
        """Returns a view of the values, ``[B, n, Hkv/TP, D]``."""
        return self._rows()[1]

    def _rows(self) -> Tensor:
        assert self._buffer is not None, "nothing has been appended yet"
        return self._buffer[:, :, self._start : self._stop]


@dataclass(frozen=True)
class Arrivals:
    """Describes the new tokens at the end of the sequence, while they pass through the layers.

    ``positions``: global, of all of them, which every rank computes. ``kept``: indices among them of those whose keys
    and values this rank keeps. ``tiles``: attention of them all to the keys of this rank, the kept ones included.
    ``dropped``: earlier tokens of this rank that none of them sees. ``padding``: rows behind them that are no tokens.
    """

    positions: range
    kept: Tensor
    tiles: tuple[TileSet, ...]
    batch: int
    dropped: int
    padding: int

    def require(self, q: Tensor) -> None:
        """Refuses queries ``[B, n, H, D]`` of other sequences, or of more or fewer new tokens, than were expected."""
        rows = len(self.positions) + self.padding
        if q.shape[:2] != (self.batch, rows):
            raise ConfigError(f"q {tuple(q.shape)} of new tokens must be [{self.batch}, {rows}, H, D], as expected")


class SequenceCache:
    """Keeps which rank holds which tokens of a batch, and this rank's keys and values of them.

    All sequences of the batch are equally long. All ranks keep the same counts; each knows the positions of its own
    tokens alone. ``layers``: how many have a shard. ``arrivals``: the tokens that are decoded now; None while a prompt
    is computed by a strategy. Under a window a rank forgets what no later token sees.
    """

    def __init__(self, group: Group, mask: Mask, layers: int) -> None:
        self.group = group
        self.mask = mask
        self.counts = [0] * group.size  # tokens that each rank holds
        self.arrivals: Arrivals | None = None
        self.shards = [KeyValueShard() for _ in range(layers)]
        self._held = np.empty(0, dtype=np.int64)  # positions of this rank's tokens that are kept
        self.prompt = slice(0)  # which of this rank's rows of a prompt are kept

    @property
    def length(self) -> int:
        return sum(self.counts)

    def expect_prompt(self, plan: SequencePlan) -> None:
        """Records a prompt, of which each rank keeps what the plan's layout gave it."""
        assert not self.length, "a prompt comes first"
        self.counts = [len(plan.positions(rank)) for rank in range(plan.world)]
        own = plan.positions(self.group.rank)
        self.prompt = slice(self._unseen(own, self.length), len(own))
        self._held = own[self.prompt]
        self.arrivals = None

    def _unseen(self, own: Int64, position: int) -> int:
        """Counts those of ascending positions that a token at ``position``, and so any after it, does not see."""
        reach, _ = self.mask.reach(position)
        return int(np.searchsorted(own, position - reach))

    def expect(self, batch: int, tokens: int, padding: int = 0, device: torch.device | str = "cpu") -> Arrivals:
        """Places new tokens of each sequence, each on the rank that was given the fewest, the first of several.

        ``padding``: rows behind them that are no tokens. ``device``: where layers compute.
        """
        whole("sequences", batch, 1)
        whole("new tokens", tokens, 1)
        positions = range(self.length, self.length + tokens)
        kept = []
        for place in range(tokens):
            holder = self.counts.index(min(self.counts))
            self.counts[holder] += 1
            if holder == self.group.rank:
                kept.append(place)
        dropped = self._unseen(self._held, positions.start)
        self._held = np.append(self._held[dropped:], positions.start + np.array(kept, dtype=np.int64))
        queries = np.arange(positions.start, positions.stop, dtype=np.int64)
        start, stop = self.mask.key_range(queries, Documents.single(positions.stop))
        tiles = group_rows([tiles_of(start, stop, self._held, np.zeros_like(start))] * batch)
        places = torch.tensor(kept, dtype=torch.int64).to(device, non_blocking=True)  # once for all layers
        self.arrivals = Arrivals(positions, places, tiles, batch, dropped, padding)
        return self.arrivals
