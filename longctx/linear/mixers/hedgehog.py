"""Hedgehog learns features that mimic softmax.

Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (2024). There are twice
as many features as channels: a softmax over both signs of a learned map that starts as the identity.

    f(x) = softmax([2 W x, -2 W x])
    S_t = S_{t-1} + f(k_t) [v_t, 1]^T        [y, z] = f(q_t) S_t        o_t = y / z
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from longctx.linear.mixer import HeadDims, Inputs, LinearCore, Mixer, no_constants, plain_tokens, scan_flops
from longctx.linear.mixers.basic import normalised
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents


def parameters(widths: HeadDims) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what each head learns: one map for queries, one for keys."""
    return {"q_map": (widths.key, widths.key), "k_map": (widths.key, widths.key)}


def fill(name: str, parameter: Tensor, generator: Generator) -> None:
    parameter.copy_(torch.eye(parameter.shape[-1]).expand_as(parameter))


def features(x: Tensor, weight: Tensor) -> Tensor:
    """Maps x ``[B, T/SP, H/TP, D]`` by weight ``[H/TP, D, D]`` to features ``[B, T/SP, H/TP, 2 D]``."""
    mapped = 2 * torch.einsum("bthd,hed->bthe", x, weight.to(x.dtype))
    return torch.cat([mapped, -mapped], -1).softmax(-1)


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    q, k = features(x["q"], x["q_map"]), features(x["k"], x["k_map"])
    return normalised(q, k, x["v"], core, plan)


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    q, k = (_by_definition(x[name], x[f"{name}_map"]) for name in ("q", "k"))
    stays = torch.ones_like(q[..., :1])
    weighted, weights = (decayed_sums(q, k, v, stays, documents) for v in (x["v"], stays))
    return weighted / torch.where(weights == 0, 1, weights)


def _by_definition(x: Tensor, weight: Tensor) -> Tensor:
    by_head = [2 * x[:, :, head] @ weight[head].T for head in range(x.shape[2])]
    mapped = torch.stack(by_head, 2)
    up, down = mapped.exp(), (-mapped).exp()
    return torch.cat([up, down], -1) / (up + down).sum(-1, keepdim=True)


def flops(widths: HeadDims, chunk: int) -> float:
    """Counts the scan of twice as many channels, and both maps."""
    return scan_flops(HeadDims(2 * widths.key, widths.value + 1), chunk) + 4.0 * widths.key**2


MIXER = Mixer(
    name="hedgehog",
    tokens=plain_tokens,
    parameters=parameters,
    constants=no_constants,
    initial=fill,
    mix=mix,
    recurrence=recurrence,
    normed=False,
    flops=flops,
    transition="none",
)
