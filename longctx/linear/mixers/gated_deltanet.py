"""Gated DeltaNet overwrites what the state holds under a token's key and decides how much of the rest stays.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024). It has short convolutions
before queries, keys and values, the gate of Mamba-2, and queries and keys of length 1.

    q, k, v = silu(convolve(.));  q, k /= |q|, |k|;  b_t = sigmoid(b);  log a_t = -e^A softplus(x_t + dt)
    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = q_t S_t / sqrt(K)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.mixer import HeadDims, Inputs, LinearCore, Mixer, delta_flops, fill_gate, no_constants, plain_tokens
from longctx.linear.mixers.simple_gla import log_decay
from longctx.linear.reference import convolved, delta_sums
from longctx.sequence import Documents

TAPS = 4  # of the short convolutions
SMALLEST = 1e-6  # what a squared length is at least, nearly


def tokens(widths: HeadDims) -> dict[str, int]:
    return {**plain_tokens(widths), "a": 1, "b": 1}


def parameters(widths: HeadDims) -> dict[str, tuple[int, ...]]:
    kernels = {f"{name}_conv": (channels, TAPS) for name, channels in plain_tokens(widths).items()}
    return {"A_log": (), "dt_bias": (), **kernels}


def fill(name: str, parameter: Tensor, generator: Generator) -> None:
    if name.endswith("_conv"):
        bound = TAPS**-0.5
        parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    else:
        fill_gate(name, parameter, generator)


def unit(x: Tensor) -> Tensor:
    """Scales rows to length 1, in the accumulation dtype: keys of other lengths make the delta rule explode."""
    in_acc_dtype = x.to(accumulation_dtype(x.dtype))
    return (in_acc_dtype * (in_acc_dtype.square().sum(-1, keepdim=True) + SMALLEST).rsqrt()).to(x.dtype)


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    q, k, v = map(F.silu, core.convolve([x[name] for name in "qkv"], [x[f"{name}_conv"] for name in "qkv"], plan))
    beta = x["b"].squeeze(-1).sigmoid()
    return core.attend(unit(q) * q.shape[-1] ** -0.5, unit(k), v, plan, log_decay=log_decay(x), beta=beta)


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    mixed = (convolved(x[name], x[f"{name}_conv"], documents) for name in "qkv")
    q, k, v = (y / (1 + torch.exp(-y)) for y in mixed)
    q, k = (y / (y.square().sum(-1, keepdim=True) + SMALLEST).sqrt() for y in (q, k))
    decay = torch.exp(-x["A_log"].exp() * (1 + (x["a"][..., 0] + x["dt_bias"]).exp()).log())
    return delta_sums(q, k, v, decay, x["b"][..., 0].sigmoid(), documents) / q.shape[-1] ** 0.5


MIXER = Mixer(
    name="gated_deltanet",
    tokens=tokens,
    parameters=parameters,
    constants=no_constants,
    initial=fill,
    mix=mix,
    recurrence=recurrence,
    normed=True,
    flops=delta_flops,
    transition="dense",
)
