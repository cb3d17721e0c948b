"""Computes short causal convolutions along a sequence that ranks share: each fetches the few tokens before its own.

    y[t] = sum over w = 0 .. W-1 of weight[W-1-w] * x[t-w], within a document

Channel by channel, as in front of the gated linear mixers (Yang et al., "Gated Delta Networks", 2024; Gu and Dao,
"Mamba", 2023). Only tokens that some document sees across the edge of a run are sent. They go forward in the dtype of
x, backward as gradients in the accumulation dtype. A halo is a few rows, so both are awaited at once. Queries, keys and
values share one halo, whose cost is that of a message. Each is convolved by itself, for side by side they would have to
be copied whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.attention.runtime.borders import require_numbers
from longctx.attention.runtime.operator import require_fit
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import Group, exchange, group_named
from longctx.errors import ConfigError
from longctx.operators import Gradient, define_operator
from longctx.sequence import Halo, SequencePlan, halo_of, plan_of
from longctx.sequence.halo import CPU


def convolve(xs: Sequence[Tensor], weights: Sequence[Tensor], plan: Tensor, group: str) -> list[Tensor]:
    """Maps each x ``[B, T/SP, H, C]`` with its weight ``[H, C, W]`` to ``[B, T/SP, H, C]``; all share one halo.

    All have the same B, H, W and dtype. ``plan``: a handle, ``group``: a name. The gradients of ``weights`` are this
    rank's shares: those of its own tokens' outputs.
    """
    out: list[Tensor] = _convolve(list(xs), list(weights), plan, group)
    return out


def run_forward(xs: list[Tensor], weights: list[Tensor], plan: Tensor, group: str) -> list[Tensor]:
    """Runs the operator ``convolve`` of this rank: fetches the halo, then convolves each x with it."""
    ranks, sequence = group_named(group), plan_of(plan)
    _require(xs, weights)
    require_fit(xs[0], sequence, ranks)
    halo = halo_of(sequence, ranks.rank, weights[0].shape[-1] - 1, xs[0].device)
    fetched = _fetch(xs, halo, ranks, sequence)
    return [_forward(x, rows, weight, halo) for x, rows, weight in zip(xs, fetched, weights, strict=True)]


def _require(xs: list[Tensor], weights: list[Tensor]) -> None:
    """Refuses anything but as many filters ``[H, C, W]`` as there are x ``[B, T/SP, H, C]``, all of one B, T, H, W."""
    if len(xs) != len(weights) or not xs:
        raise ConfigError(f"{len(xs)} inputs of a convolution and {len(weights)} filters must be as many, at least one")
    require_numbers({f"x {number}": x for number, x in enumerate(xs)})
    tokens, taps = xs[0].shape[:3], weights[0].shape[-1:]
    for x, weight in zip(xs, weights, strict=True):
        require_numbers({"weight": weight})
        fits = x.ndim == 4 and x.shape[:3] == tokens and weight.shape == (*x.shape[2:], *taps) and weight.shape[-1] > 0
        if not fits or weight.device != x.device:
            raise ConfigError(
                f"x {tuple(x.shape)} and its filter {tuple(weight.shape)} on {weight.device} must be [B, T, H, C] and "
                f"[H, C, W] on {x.device}, with the B, T and H {tuple(tokens)} and the W {tuple(taps)} of the first"
            )


def _forward(x: Tensor, fetched: Tensor, weight: Tensor, halo: Halo) -> Tensor:
    extended, taps = torch.cat([x, fetched], 1), weight.to(accumulation_dtype(x.dtype))
    out = x * taps[..., -1]
    for back, (index, seen) in enumerate(zip(halo.index, halo.seen.unbind(1), strict=True), start=1):
        out += extended.index_select(1, index).masked_fill(~seen[..., None, None], 0) * taps[..., -1 - back]
    return out.to(x.dtype)


def run_backward(
    douts: list[Tensor], xs: list[Tensor], weights: list[Tensor], plan: Tensor, group: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns gradients of each x and weight; those of other ranks' rows go home first."""
    ranks, sequence = group_named(group), plan_of(plan)
    halo = halo_of(sequence, ranks.rank, weights[0].shape[-1] - 1, xs[0].device)
    fetched = _fetch(xs, halo, ranks, sequence)
    dxs, dweights = zip(*(_backward(*given, halo) for given in zip(douts, xs, fetched, weights, strict=True)))
    homes = _home(dxs, xs[0].shape[1], halo, ranks, sequence)
    return [home.to(x.dtype) for home, x in zip(homes, xs, strict=True)], list(dweights)


def _backward(dout: Tensor, x: Tensor, fetched: Tensor, weight: Tensor, halo: Halo) -> tuple[Tensor, Tensor]:
    """Returns gradients of x and the halo behind it, ``[B, T/SP + halo, H, C]``, and of weight.

    The first are in the accumulation dtype.
    """
    extended, wide = torch.cat([x, fetched], 1), accumulation_dtype(x.dtype)
    taps, dout = weight.to(wide), dout.to(wide)
    dx = dout.new_zeros(extended.shape)
    dweight = torch.empty_like(taps)
    dx[:, : x.shape[1]] = dout * taps[..., -1]
    dweight[..., -1] = (dout * x).sum((0, 1))
    for back, (index, seen) in enumerate(zip(halo.index, halo.seen.unbind(1), strict=True), start=1):
        visible = dout.masked_fill(~seen[..., None, None], 0)
        dweight[..., -1 - back] = (visible * extended.index_select(1, index)).sum((0, 1))
        dx.index_add_(1, index, visible * taps[..., -1 - back])
    return dx, dweight.to(weight.dtype)


def _fetch(xs: Sequence[Tensor], halo: Halo, ranks: Group, plan: SequencePlan) -> Sequence[Tensor]:
    """Fetches, for each x, the rows of other ranks that are read here, ``[B, halo, H, C]``, all in one message."""
    rows = [halo_of(plan, reader, len(halo.index), CPU).rows[ranks.rank] for reader in range(ranks.size)]
    sends = [(reader, torch.cat([its.take(x) for x in xs], -1)) for reader, its in enumerate(rows)]
    widths = [x.shape[-1] for x in xs]
    buffers = [xs[0].new_empty(len(xs[0]), len(its), xs[0].shape[2], sum(widths)) for its in halo.rows]
    return torch.cat(exchange(ranks, sends, list(enumerate(buffers))).wait(), 1).split(widths, -1)


def _home(dxs: Sequence[Tensor], own: int, halo: Halo, ranks: Group, plan: SequencePlan) -> list[Tensor]:
    """Adds up gradients of this rank's rows, ``[B, T/SP, H, C]``: its own shares, and what other ranks send."""
    rows = [halo_of(plan, reader, len(halo.index), CPU).rows[ranks.rank] for reader in range(ranks.size)]
    widths = [dx.shape[-1] for dx in dxs]
    shares = torch.cat([dx[:, own:] for dx in dxs], -1).split([len(its) for its in halo.rows], 1)
    buffers = [dxs[0].new_empty(len(dxs[0]), len(its), dxs[0].shape[2], sum(widths)) for its in rows]
    sends = [(owner, share.contiguous()) for owner, share in enumerate(shares)]
    homes = [dx[:, :own] for dx in dxs]
    for its, share in zip(rows, exchange(ranks, sends, list(enumerate(buffers))).wait(), strict=True):
        for home, part in zip(homes, share.split(widths, -1), strict=True):
            its.add_to(home, part)
    return homes


def _shapes(xs: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


_convolve = define_operator(
    "short_convolution",
    "(Tensor[] xs, Tensor[] weights, Tensor plan, str group) -> (Tensor[] out)",
    run_forward,
    _shapes,
    Gradient(run_backward, saves=("xs", "weights")),
)
