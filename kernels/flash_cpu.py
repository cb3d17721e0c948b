"""Computes attention with PyTorch's fused flash-attention kernel for CPUs.

Facts that shape this file (checked on torch 2.13.0):
- The causal mask of the operator is aligned top-left.
- It takes fewer key heads than query heads.
- The log-sum-exp is natural.
- The backward accepts an external (global) output and log-sum-exp.
- Zero keys kill the process, which tiles never have.
- A mask must be floating and of the query's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longctx.attention.runtime.local_kernel import KernelProblem
from longctx.attention.runtime.partial import Partial
from longctx.kernels.pieces import SQUARES, PieceShape, TilePiece, pieces_of, split_squares
from longctx.sequence import TileSet

# The operator computes blocks of 512 keys, squares on a diagonal whole: at 512 rows a causal mask saves it nothing.
# In halves of halves 10 to 25% of a large square's time is saved; below 256 rows more launches cost what they save.
LARGEST_SQUARE = 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlashCpu:
    """The kernel that runs PyTorch's fused flash attention on a CPU."""

    name = "flash_cpu"

    def refuses(self, problem: KernelProblem) -> str | None:
        if problem.device != "cpu":
            return f"device {problem.device}: it runs on cpu"
        if problem.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"dtype {problem.dtype}: it takes float32, float64, bfloat16 and float16"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileSet], scale: float, into: Partial) -> None:
        for batch, piece in _launches(tiles):
            rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
            turn = _turn(piece)
            out, lse = _forward(
                turn(q[batch, rows]).transpose(1, 2),
                turn(k[batch, keys]).transpose(1, 2),
                turn(v[batch, keys]).transpose(1, 2),
                0.0,
                piece.shape in SQUARES,
                attn_mask=_mask(piece, q.dtype),
                scale=scale,
            )
            into.merge(batch, rows, turn(out.transpose(1, 2)), turn(lse.transpose(1, 2)))

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
        for batch, piece in _launches(tiles):
            rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
            turn = _turn(piece)
            d_query, d_key, d_value = _backward(
                turn(dout[batch, rows]).transpose(1, 2),
                turn(q[batch, rows]).transpose(1, 2),
                turn(k[batch, keys]).transpose(1, 2),
                turn(v[batch, keys]).transpose(1, 2),
                turn(out[batch, rows]).transpose(1, 2),
                turn(lse[batch, rows]).transpose(1, 2),
                0.0,
                piece.shape in SQUARES,
                attn_mask=_mask(piece, q.dtype),
                scale=scale,
            )
            dq[batch, rows] += turn(d_query.transpose(1, 2))
            dk[batch, keys] += turn(d_key.transpose(1, 2))
            dv[batch, keys] += turn(d_value.transpose(1, 2))


def _launches(tiles: Sequence[TileSet]) -> Iterator[tuple[slice, TilePiece]]:
    for tile_set in tiles:
        for tile in tile_set.tiles:
            for piece in pieces_of(tile):
                for part in split_squares(piece, LARGEST_SQUARE):
                    yield slice(tile_set.batch_start, tile_set.batch_stop), part


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _reversed(tensor: Tensor) -> Tensor:
    return tensor.flip(1)


def _turn(piece: TilePiece) -> Callable[[Tensor], Tensor]:
    """Returns what makes the piece causal: queries and keys of an anticausal square in reverse order."""
    return _reversed if piece.shape is PieceShape.ANTICAUSAL else _same


def _mask(piece: TilePiece, dtype: torch.dtype) -> Tensor | None:
    if piece.shape is not PieceShape.BAND:
        return None
    return _band_mask(piece.q_stop - piece.q_start, piece.k_stop - piece.k_start, dtype)


@lru_cache(maxsize=32)
def _band_mask(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Returns a mask that is 0 where query i sees key j, else -inf.

    It sees ``i <= j < i + width`` with width = keys - queries + 1.
    """
    ones = torch.ones(queries, keys, dtype=torch.bool)
    seen = ones.triu() & ones.tril(keys - queries)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(~seen, -torch.inf)
