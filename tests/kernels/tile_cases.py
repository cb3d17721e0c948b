"""Tiles of every kind, and their attention by a softmax over explicit cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.sequence import Tile, TileSet
from tests.sequence.brute_force import tile_cells

KINDS = {
    "full": Tile(2, 9, 3, 15),
    "one cell": Tile(4, 5, 6, 7),
    "causal square": Tile(1, 9, 2, 10, upper=True),
    "causal, more keys": Tile(1, 9, 2, 15, upper=True),
    "anticausal square": Tile(0, 10, 4, 14, lower=True),
    "anticausal, more keys": Tile(3, 10, 0, 12, lower=True),
    "band of one": Tile(0, 9, 3, 12, lower=True, upper=True),
    "band": Tile(2, 10, 1, 12, lower=True, upper=True),
    "wide band": Tile(2, 5, 1, 14, lower=True, upper=True),
}


def tensors(
    dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)

    def draw(rows: int, count: int) -> Tensor:
        return torch.randn(batch, rows, count, dim, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": draw(queries, heads),
        "k": draw(keys, kv_heads),
        "v": draw(keys, kv_heads),
        "dout": draw(queries, heads),
    }


def seen_cells(tile_sets: list[TileSet], batch: int, queries: int, keys: int) -> Tensor:
    """Bool ``[B, Tq, Tk]``; fails if a cell is in two tiles."""
    times = torch.zeros(batch, queries, keys, dtype=torch.int64)
    for tile_set in tile_sets:
        for row in range(tile_set.batch_start, tile_set.batch_stop):
            for tile in tile_set.tiles:
                for query, key in tile_cells(tile):
                    times[row, query, key] += 1
    assert times.max() <= 1
    return times.bool()


def expected(whole: dict[str, Tensor], seen: Tensor, scale: float) -> dict[str, Tensor]:
    """out, lse and gradients in float64; a query that sees nothing has out 0, lse -inf and no gradient."""
    q, k, v, dout = (whole[name].double() for name in ("q", "k", "v", "dout"))
    group = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(group, dim=2) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    upstream = torch.einsum("bqhd,bkhd->bhqk", dout, v) - (dout * out).sum(-1).transpose(1, 2)[..., None]
    upstream = upstream * weights * scale
    return {
        "out": out,
        "lse": lse.transpose(1, 2),
        "dq": torch.einsum("bhqk,bkhd->bqhd", upstream, k),
        "dk": torch.einsum("bhqk,bqhd->bkhd", upstream, q).unflatten(2, (-1, group)).sum(3),
        "dv": torch.einsum("bhqk,bqhd->bkhd", weights, dout).unflatten(2, (-1, group)).sum(3),
    }


def run_kernel(kernel, whole: dict[str, Tensor], tile_sets: list[TileSet], scale: float) -> dict[str, Tensor]:
    """Forward, then backward of its result, as the strategies call them."""
    q, k, v, dout = (whole[name] for name in ("q", "k", "v", "dout"))
    partial = Partial(q)
    kernel.forward(q, k, v, tile_sets, scale, partial)
    dtype = accumulation_dtype(q.dtype)
    grads = tuple(torch.zeros(tensor.shape, dtype=dtype) for tensor in (q, k, v))
    kernel.backward(dout, q, k, v, partial.out.to(q.dtype), partial.lse, tile_sets, scale, grads)
    assert {tensor.dtype for tensor in (partial.out, partial.lse, *grads)} == {dtype}
    return {"out": partial.out, "lse": partial.lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def assert_close(computed: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """In norm, relative to the tensor and a tenth of the output's.

    Where a query sees one key alone, its dq is the difference of two equal numbers of the output's size:
    rounding of these is what remains.
    """
    floor = 0.1 * truth["out"].norm()
    for name, right in truth.items():
        mine = computed[name].double()
        assert torch.equal(mine.isinf(), right.isinf()), f"{name} is infinite at other places"
        finite = ~right.isinf()
        error, size = (mine - right)[finite].norm(), right[finite].norm() + floor
        assert error <= tolerance * size, f"{name} is off by {error / size:.2e}, at most {tolerance:.0e}"
