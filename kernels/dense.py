"""Computes attention by plain matrix products per tile: the reference kernel, for any dtype and device.

It accumulates in fp32 (fp64 for fp64). At a time it holds the scores of at most ``MAX_SCORES`` cells of one batch row
and head group. Keys and values are never expanded to the query heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longctx.attention.runtime.local_kernel import KernelProblem
from longctx.attention.runtime.partial import Partial
from longctx.sequence import Tile, TileSet

MAX_SCORES = 1 << 22


class Dense:
    """The reference kernel, which takes every problem."""

    name = "dense"

    def refuses(self, problem: KernelProblem) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileSet], scale: float, into: Partial) -> None:
        for batch, rows, keys, hidden in _pieces(tiles, q.device):
            scores = _scores(q[batch, rows], k[batch, keys], hidden, scale, into.lse.dtype)
            lse = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - lse.unsqueeze(-1))
            out = torch.einsum("bhgqk,bkhd->bqhgd", weights, v[batch, keys].to(weights.dtype))
            into.merge(batch, rows, out.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3))

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Sequence[TileSet],
        scale: float,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        dq, dk, dv = grads
        dtype, groups = dq.dtype, (k.shape[2], q.shape[2] // k.shape[2])
        for batch, rows, keys, hidden in _pieces(tiles, q.device):
            scores = _scores(q[batch, rows], k[batch, keys], hidden, scale, dtype)
            row_lse = lse[batch, rows].unflatten(2, groups).permute(0, 2, 3, 1)
            weights = torch.exp(scores - row_lse.unsqueeze(-1))
            d_rows = dout[batch, rows].to(dtype)
            delta = (d_rows * out[batch, rows].to(dtype)).sum(-1).unflatten(2, groups).permute(0, 2, 3, 1)
            d_rows = d_rows.unflatten(2, groups)
            d_weights = torch.einsum("bqhgd,bkhd->bhgqk", d_rows, v[batch, keys].to(dtype))
            d_scores = weights * (d_weights - delta.unsqueeze(-1)) * scale
            dv[batch, keys] += torch.einsum("bhgqk,bqhgd->bkhd", weights, d_rows)
            dk[batch, keys] += torch.einsum(
                "bhgqk,bqhgd->bkhd", d_scores, q[batch, rows].to(dtype).unflatten(2, groups)
            )
            d_query = torch.einsum("bhgqk,bkhd->bqhgd", d_scores, k[batch, keys].to(dtype))
            dq[batch, rows] += d_query.flatten(2, 3)


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns scaled scores ``[b, Hkv, H/Hkv, n_queries, n_keys]``, -inf where a diagonal hides the key."""
    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(dtype)) * scale
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _pieces(tiles: Sequence[TileSet], device: torch.device) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """Yields (batch row, query rows, key rows, hidden cells) of all tiles, cut to ``MAX_SCORES`` cells."""
    for tile_set in tiles:
        for row in range(tile_set.batch_start, tile_set.batch_stop):
            for tile in tile_set.tiles:
                step = max(1, MAX_SCORES // tile.keys)
                for first in range(0, tile.queries, step):
                    last = min(first + step, tile.queries)
                    rows = slice(tile.q_start + first, tile.q_start + last)
                    keys = slice(tile.k_start, tile.k_stop)
                    yield slice(row, row + 1), rows, keys, masked_cells(tile, first, last, device)


def masked_cells(tile: Tile, first: int, last: int, device: torch.device) -> Tensor | None:
    """Returns bool ``[last - first, n_keys]``: cells of queries ``[first, last)`` that the tile's diagonals hide."""
    low, high = tile.band
    if low is None and high is None:
        return None
    offset = torch.arange(tile.keys, device=device) - torch.arange(first, last, device=device)[:, None]
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if low is not None:
        hidden |= offset < low
    if high is not None:
        hidden |= offset > high
    return hidden
