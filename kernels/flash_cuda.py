"""Computes attention with PyTorch's bundled FlashAttention-2 on CUDA, by variable-length launches.

A list of tiles is lowered to one launch per kind of mask: every tile is one "sequence" of a packed batch.
FlashAttention-2 aligns causal masks and windows bottom-right, exactly as tiles do: with n queries and m keys
query i sees ``i + m - n - left <= j <= i + m - n + right``. So a tile cut on the upper side has right 0, and one
cut on the lower side has left m - n. -1 stands for no limit. Nothing here waits for the device: sizes
are known on the host, offsets go over from pinned memory.

Written from torch 2.13's ``torch.nn.attention.varlen`` and its meta functions, compiled and reviewed without a GPU at
hand. Its lowering is tested on the CPU against an emulation of the operator's definition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from longctx.attention.runtime.local_kernel import KernelProblem
from longctx.attention.runtime.partial import Partial
from longctx.sequence import Tile, TileSet

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

MAX_HEAD_DIM = 256  # of FlashAttention-2


@dataclass(frozen=True)
class Launch:
    """One kernel launch that computes tiles of equal window, each of one batch row, packed one after another."""

    left: int
    right: int
    members: tuple[tuple[int, Tile], ...]

    @property
    def max_q(self) -> int:
        return max(tile.queries for _, tile in self.members)

    @property
    def max_k(self) -> int:
        return max(tile.keys for _, tile in self.members)

    @property
    def query_offsets(self) -> list[int]:
        return list(accumulate((tile.queries for _, tile in self.members), initial=0))

    @property
    def key_offsets(self) -> list[int]:
        return list(accumulate((tile.keys for _, tile in self.members), initial=0))

    def pack_queries(self, tensor: Tensor) -> Tensor:
        """Packs the queries ``[B, Tq, ...]`` of all tiles into ``[total_q, ...]``; a view when there is one tile."""
        return _pack(tensor[row, tile.q_start : tile.q_stop] for row, tile in self.members)

    def pack_keys(self, tensor: Tensor) -> Tensor:
        return _pack(tensor[row, tile.k_start : tile.k_stop] for row, tile in self.members)


def _pack(parts: Iterable[Tensor]) -> Tensor:
    pieces = list(parts)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@lru_cache(maxsize=64)
def launches_of(tiles: tuple[TileSet, ...]) -> tuple[Launch, ...]:
    """Lowers tiles to as few launches as there are windows: full, causal, and one for each window width."""
    kinds: dict[tuple[int, int], list[tuple[int, Tile]]] = defaultdict(list)
    for tile_set in tiles:
        for row in range(tile_set.batch_start, tile_set.batch_stop):
            for tile in tile_set.tiles:
                left = tile.keys - tile.queries if tile.lower else -1
                kinds[left, 0 if tile.upper else -1].append((row, tile))
    return tuple(Launch(left, right, tuple(members)) for (left, right), members in kinds.items())


@lru_cache(maxsize=256)
def _offsets(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns int32 offsets on the device, copied without blocking the host."""
    host = torch.tensor(offsets, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class FlashCuda:
    """The kernel that runs PyTorch's bundled FlashAttention-2 on a GPU."""

    name = "flash_cuda"

    def refuses(self, problem: KernelProblem) -> str | None:
        if problem.device != "cuda":
            return f"device {problem.device}: it runs on cuda"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {problem.dtype}: it takes float16 and bfloat16"
        if problem.head_dim % 8 or problem.head_dim > MAX_HEAD_DIM:
            return f"head_dim {problem.head_dim}: it takes multiples of 8 up to {MAX_HEAD_DIM}"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"compute capability {major}.{minor}: it needs 8.0"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileSet], scale: float, into: Partial) -> None:
        for launch in launches_of(tuple(tiles)):
            out, lse, *_ = _forward(
                launch.pack_queries(q),
                launch.pack_keys(k),
                launch.pack_keys(v),
                _offsets(tuple(launch.query_offsets), q.device),
                _offsets(tuple(launch.key_offsets), q.device),
                launch.max_q,
                launch.max_k,
                0.0,
                False,
                False,
                scale=scale,
                window_size_left=launch.left,
                window_size_right=launch.right,
            )
            for (row, tile), start in zip(launch.members, launch.query_offsets, strict=False):
                packed = slice(start, start + tile.queries)
                into.merge(
                    slice(row, row + 1),
                    slice(tile.q_start, tile.q_stop),
                    out[packed].unsqueeze(0),
                    lse[:, packed].T.unsqueeze(0),
                )

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
        for launch in launches_of(tuple(tiles)):
            d_queries, d_keys, d_values = _backward(
                launch.pack_queries(dout).contiguous(),
                launch.pack_queries(q),
                launch.pack_keys(k),
                launch.pack_keys(v),
                launch.pack_queries(out),
                launch.pack_queries(lse).T.contiguous(),
                _offsets(tuple(launch.query_offsets), q.device),
                _offsets(tuple(launch.key_offsets), q.device),
                launch.max_q,
                launch.max_k,
                0.0,
                False,
                torch.zeros(2, dtype=torch.uint64, device=q.device),  # state of a dropout that is off
                torch.empty(0, device=q.device),
                scale=scale,
                window_size_left=launch.left,
                window_size_right=launch.right,
            )
            for (row, tile), start in zip(launch.members, launch.query_offsets, strict=False):
                dq[row, tile.q_start : tile.q_stop] += d_queries[start : start + tile.queries]
            for (row, tile), start in zip(launch.members, launch.key_offsets, strict=False):
                keys = slice(tile.k_start, tile.k_stop)
                dk[row, keys] += d_keys[start : start + tile.keys]
                dv[row, keys] += d_values[start : start + tile.keys]
