"""Computes the MLP of a block in tiles of tokens: its intermediates ``[tokens, hidden_dim]`` never exist whole.

Forward runs one tile after the other and keeps the MLP's input alone; backward runs each tile again and
differentiates it before the next. Known from DeepSpeed's ALST. Arithmetic is that of recomputing the MLP.

Inside a recomputed block it is run no third time: the input is kept by a node of its own, before the tiles.
Once a recompute has come to it, the checkpoint has all that it needs and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from longctx.model import Block, Decoder

Mlp = Callable[[Tensor], Tensor]

_IN_TILE: ContextVar[bool] = ContextVar("in_tile", default=False)


def in_tile() -> bool:
    """Returns whether a tile is being run; recompute keeps nothing of a tile."""
    return _IN_TILE.get()


def tile_mlps(model: Decoder, chunk: int | None, tensor_degree: int) -> None:
    """Makes every block compute its MLP in tiles of ``chunk`` tokens, None for all at once.

    A rank of the tensor axis holds its part of these tokens.
    """
    if chunk is None:
        return
    for block in model.layers:
        block.mlp = TiledMlp(block, max(1, chunk // tensor_degree))  # type: ignore[method-assign]


class TiledMlp:
    """Runs ``block.mlp`` over at most ``tokens`` rows of x ``[B, T/SP/TP, dim]`` at a time, all sequences counted."""

    def __init__(self, block: Block, tokens: int) -> None:
        self._run: Mlp = block.mlp
        self._modules = (block.mlp_norm, block.gate, block.up, block.mlp_out, block.mlp_post_norm)
        self._tokens = tokens

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x)
        out: Tensor = _Tiles.apply(_Kept.apply(x), self, *self.parameters())
        return out

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that are in place now: FSDP2 puts gathered ones there for the time of a pass."""
        return [parameter for module in self._modules for parameter in module.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        with _in_tiles():
            for rows in self._tiles(x):
                out[:, rows] = self._run(x[:, rows])
        return out

    def backward(self, x: Tensor, dout: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Computes gradients of x and of the parameters; the latter's sums over tiles are fp32 (fp64 for fp64)."""
        parameters = self.parameters()
        dx = torch.empty_like(x)
        totals: list[Tensor] = []
        for rows in self._tiles(x):
            tile = x[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                out = self._run(tile)
            dx[:, rows], *gradients = torch.autograd.grad(out, (tile, *parameters), dout[:, rows])
            del out
            if totals:
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient
            else:
                totals = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        return dx, [total.to(p.dtype) for total, p in zip(totals, parameters, strict=True)]

    def _tiles(self, x: Tensor) -> Iterator[slice]:
        step = max(1, self._tokens // x.shape[0])
        for start in range(0, x.shape[1], step):
            yield slice(start, start + step)


@contextmanager
def _in_tiles() -> Iterator[None]:
    token = _IN_TILE.set(True)
    try:
        yield
    finally:
        _IN_TILE.reset(token)


class _Kept(torch.autograd.Function):
    """Keeps the MLP's input for ``_Tiles``, the last thing that a recomputed block keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (dx,) = upstream
        return dx


class _Tiles(torch.autograd.Function):
    """Saves nothing itself: see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: TiledMlp, *_parameters: Tensor) -> Tensor:
        ctx.mlp, ctx.kept = mlp, x.grad_fn
        return mlp.forward(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.kept.saved_tensors
        dx, gradients = ctx.mlp.backward(x, upstream[0])
        return (dx, None, *gradients)
