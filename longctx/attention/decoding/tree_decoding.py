"""Tree decoding: a few new queries attend to keys and values that are sharded over a group.

Shyam et al., "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters" (2024), algorithm 3.

    (out, lse) of the new queries over the keys that lie here; 0 and -inf where none does
    m = all-reduce MAX of lse
    d = all-reduce SUM of exp(lse - m)
    n = all-reduce SUM of exp(lse - m) * out
    out = n / d

The three reductions carry H/TP (D + 2) numbers of each new token, however long the sequence is. The library that
carries them makes the tree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ambient import apart
from longctx.attention.core import CoreAttention, Started
from longctx.attention.decoding.cache import Arrivals, SequenceCache
from longctx.attention.runtime.borders import dense, require_operands, require_plain
from longctx.attention.runtime.local_kernel import kernel_for
from longctx.attention.runtime.partial import Partial
from longctx.attention.runtime.sizes import Sizes
from longctx.comm import MAX, SUM, Group, all_reduce


class CachedAttention:
    """Computes attention of one layer and keeps its keys and values in a cache.

    A prompt, cut over the ranks by a plan, is computed by ``whole``, a strategy. New tokens, of which every rank has
    all, are computed by tree decoding. The cache says which of them comes.
    """

    def __init__(self, whole: CoreAttention, cache: SequenceCache, layer: int, kernel: str = "auto") -> None:
        self._whole = whole
        self._cache = cache
        self._shard = cache.shards[layer]
        self._kernel = kernel

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """Starts attention of a prompt's local tokens, or of n new ones.

        q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``, or ``[B, n, ...]`` of new tokens and
        the rows of padding behind them, for which ``plan`` is not read.
        """
        cache = self._cache
        require_plain((("q", q), ("k", k), ("v", v)))
        require_operands(q, k, v)
        if cache.arrivals is None:
            self._shard.append(k[:, cache.prompt], v[:, cache.prompt])
            return self._whole.start(q, k, v, plan)
        cache.arrivals.require(q)
        new = len(cache.arrivals.positions)
        out = self._decoded(q[:, :new], k[:, :new], v[:, :new], cache.arrivals)
        return Started(F.pad(out, (0, 0, 0, 0, 0, cache.arrivals.padding)))

    @apart
    def _decoded(self, q: Tensor, k: Tensor, v: Tensor, arrivals: Arrivals) -> Tensor:
        """Attention of new tokens ``[B, n, ...]``, whose keys and values are kept where they belong."""
        self._shard.drop(arrivals.dropped)
        self._shard.append(k[:, arrivals.kept], v[:, arrivals.kept])
        partial, kernel = Partial(q), kernel_for(self._kernel, q, k)
        kernel.forward(dense(q), self._shard.keys, self._shard.values, arrivals.tiles, q.shape[-1] ** -0.5, partial)
        out, _ = reduce(partial.out, partial.lse, self._cache.group)
        return out.to(q.dtype)

    def finish(self, started: Started) -> Tensor:
        return self._whole.finish(started) if self._cache.arrivals is None else started.out


def reduce(out: Tensor, lse: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Merges attention over the keys of each rank into that over the keys of all.

    out ``[B, n, H/TP, D]`` and lse ``[B, n, H/TP]``. Some rank's lse of every query is finite: a query sees itself.
    """
    largest = all_reduce(group, lse.clone(), MAX)
    weights = torch.exp(lse - largest).unsqueeze(-1)
    denominator = all_reduce(group, weights.clone(), SUM)
    numerator = all_reduce(group, weights * out, SUM)
    return numerator / denominator, largest + denominator.squeeze(-1).log()


def volume(world: int, tokens: int, sizes: Sizes) -> int:
    """Returns the bytes that a rank sends in one layer for ``tokens`` new tokens of each sequence."""
    return sum(2 * (world - 1) * tokens * each // world for each in (sizes.lse, sizes.lse, sizes.query_gradients))
