"""BASED approximates softmax's exponential by its second-order Taylor polynomial, a product of features.

Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (2024). It wants narrow
queries and keys, for their features are about half of the width squared. It also wants layers with a sliding window
beside it (``attention.window`` of the softmax layers of a pattern).

    f(x) = [1, x / d^(1/4), x_i^2 / sqrt(2d), x_i x_j / sqrt(d) for i < j]
    f(q) f(k) = 1 + s + s^2 / 2,  s = q k / sqrt(d)
    S_t = S_{t-1} + f(k_t) [v_t, 1]^T        [y, z] = f(q_t) S_t        o_t = y / z
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longctx.linear.mixer import (
    HeadDims,
    Inputs,
    LinearCore,
    Mixer,
    no_constants,
    no_parameters,
    nothing_to_fill,
    scan_flops,
)
from longctx.linear.mixers.basic import normalised
from longctx.sequence import Documents

WIDTH = 16  # channels of a query at most


def tokens(widths: HeadDims) -> dict[str, int]:
    width = min(WIDTH, widths.key)
    return {"q": width, "k": width, "v": widths.value}


def features(x: Tensor) -> Tensor:
    """Maps ``[..., d]`` to features ``[..., 1 + d + d (d + 1) / 2]``."""
    width = x.shape[-1]
    first, second = torch.triu_indices(width, width, offset=1, device=x.device)
    parts = (
        torch.ones_like(x[..., :1]),
        x * width**-0.25,
        x.square() * (2 * width) ** -0.5,
        x[..., first] * x[..., second] * width**-0.5,
    )
    return torch.cat(parts, -1)


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    return normalised(features(x["q"]), features(x["k"]), x["v"], core, plan)


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    """Computes the output from the polynomial itself, query by query."""
    out = torch.zeros_like(x["v"])
    for row, packed in enumerate(documents):
        for start, stop in pairwise(packed.cu_seqlens.tolist()):
            for t in range(start, stop):
                score = torch.einsum("hd,nhd->nh", x["q"][row, t], x["k"][row, start : t + 1]) / x["q"].shape[-1] ** 0.5
                weight = 1 + score + score.square() / 2
                read = torch.einsum("nh,nhv->hv", weight, x["v"][row, start : t + 1])
                out[row, t] = read / weight.sum(0).unsqueeze(-1)
    return out


def flops(widths: HeadDims, chunk: int) -> float:
    width = tokens(widths)["q"]
    return scan_flops(HeadDims(1 + width + width * (width + 1) // 2, widths.value + 1), chunk)


MIXER = Mixer(
    name="based",
    tokens=tokens,
    parameters=no_parameters,
    constants=no_constants,
    initial=nothing_to_fill,
    mix=mix,
    recurrence=recurrence,
    normed=False,
    flops=flops,
    transition="none",
)
