"""Short causal convolutions along a sequence that is shared by ranks: each fetches the few tokens before its own.

    y[t] = sum over w = 0 .. W-1 of weight[W-1-w] * x[t-w], within a document

Channel by channel, as in front of the gated linear mixers (Yang et al., "Gated Delta Networks", 2024; Gu and Dao,
"Mamba", 2023). Only tokens that some document sees across the edge of a run are sent, forward in the dtype of x,
backward their gradients in the accumulation dtype; a halo is a few rows, so both are awaited at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.attention.operator import register
from longctx.attention.partial import accumulation_dtype
from longctx.comm import Group, exchange, group_named
from longctx.sequence import Halo, SequencePlan, plan_of


def convolve(x: Tensor, weight: Tensor, plan: Tensor, group: str) -> Tensor:
    """x ``[B, T/SP, H, C]``, weight ``[H, C, W]`` to ``[B, T/SP, H, C]``; ``plan``: a handle, ``group``: a name.

    The gradient of ``weight`` is this rank's share: that of its own tokens' outputs.
    """
    out: Tensor = _convolve(x, weight, plan, group)
    return out


def run_forward(x: Tensor, weight: Tensor, plan: Tensor, group: str) -> Tensor:
    ranks, sequence = group_named(group), plan_of(plan)
    halo = sequence.halo(ranks.rank, weight.shape[-1] - 1, x.device)
    extended, wide = _extended(x, halo, ranks, sequence), accumulation_dtype(x.dtype)
    taps = weight.to(wide)
    out = x * taps[..., -1]
    for back, (index, seen) in enumerate(zip(halo.index, halo.seen.unbind(1), strict=True), start=1):
        out += extended.index_select(1, index) * seen[..., None, None] * taps[..., -1 - back]
    return out.to(x.dtype)


def run_backward(dout: Tensor, x: Tensor, weight: Tensor, plan: Tensor, group: str) -> tuple[Tensor, Tensor]:
    ranks, sequence = group_named(group), plan_of(plan)
    halo = sequence.halo(ranks.rank, weight.shape[-1] - 1, x.device)
    extended, wide = _extended(x, halo, ranks, sequence), accumulation_dtype(x.dtype)
    taps, dout = weight.to(wide), dout.to(wide)
    dx = dout.new_zeros(extended.shape)
    dweight = torch.empty_like(taps)
    dx[:, : x.shape[1]] = dout * taps[..., -1]
    dweight[..., -1] = (dout * x).sum((0, 1))
    for back, (index, seen) in enumerate(zip(halo.index, halo.seen.unbind(1), strict=True), start=1):
        visible = dout * seen[..., None, None]
        dweight[..., -1 - back] = (visible * extended.index_select(1, index)).sum((0, 1))
        dx.index_add_(1, index, visible * taps[..., -1 - back])
    return _home(dx, x.shape[1], halo, ranks, sequence).to(x.dtype), dweight.to(weight.dtype)


def _extended(x: Tensor, halo: Halo, ranks: Group, plan: SequencePlan) -> Tensor:
    """x and behind it the rows of other ranks, ``[B, T/SP + halo, H, C]``."""
    rows = [plan.halo(reader, len(halo.index)).rows[ranks.rank] for reader in range(ranks.size)]
    sends = [(reader, its.take(x).contiguous()) for reader, its in enumerate(rows)]
    buffers = [x.new_empty(len(x), len(its), *x.shape[2:]) for its in halo.rows]
    received = exchange(ranks, sends, list(enumerate(buffers))).wait()
    return torch.cat([x, *received], 1)


def _home(dx: Tensor, own: int, halo: Halo, ranks: Group, plan: SequencePlan) -> Tensor:
    """The gradient of this rank's rows, ``[B, T/SP, H, C]``: its own share, and what other ranks send of theirs."""
    rows = [plan.halo(reader, len(halo.index)).rows[ranks.rank] for reader in range(ranks.size)]
    shares = dx[:, own:].split([len(its) for its in halo.rows], 1)
    buffers = [dx.new_empty(len(dx), len(its), *dx.shape[2:]) for its in rows]
    sends = [(owner, share.contiguous()) for owner, share in enumerate(shares)]
    home = dx[:, :own]
    for its, share in zip(rows, exchange(ranks, sends, list(enumerate(buffers))).wait(), strict=True):
        its.add_to(home, share)
    return home


def halo_rows_sent(plan: SequencePlan, rank: int, reach: int) -> tuple[int, int]:
    """Rows that ``rank`` sends forward, and of gradients backward, where it sends those of forward once more."""
    forward = sum(len(plan.halo(reader, reach).rows[rank]) for reader in range(plan.world))
    return forward, plan.halo(rank, reach).length


_convolve = register(
    "short_convolution",
    run_forward,
    "(Tensor x, Tensor weight, Tensor plan, str group) -> Tensor",
)
_convolve_backward = register(
    "short_convolution_backward",
    run_backward,
    "(Tensor dout, Tensor x, Tensor weight, Tensor plan, str group) -> (Tensor, Tensor)",
)


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, plan: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


@_convolve_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, plan: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, plan = ctx.saved_tensors
    return (*_convolve_backward(dout, x, weight, plan, ctx.group), None, None)


_convolve.register_autograd(_differentiate, setup_context=_remember)
