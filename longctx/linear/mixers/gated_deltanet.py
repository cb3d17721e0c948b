"""Gated DeltaNet overwrites what the state holds under a token's key and decides how much of the rest stays.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024). It has short convolutions
before queries, keys and values, the gate of Mamba-2, and queries and keys of length 1.

    q, k, v = silu(convolve(.));  q, k /= |q|, |k|;  b_t = sigmoid(b);  log a_t = -e^A softplus(x_t + dt)
    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = q_t S_t / sqrt(K)

Released models have fewer heads of queries and keys than of values; each then serves consecutive ones. Where b_t is
doubled, the eigenvalue of the state along k_t is in (-1, 1) (Grazzini et al., "Unlocking State-Tracking in Linear RNNs
Through Negative Eigenvalues", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.mixer import HeadDims, Inputs, LinearCore, Mixer, delta_flops, fill_gate, no_constants, plain_tokens
from longctx.linear.mixers.simple_gla import log_decay
from longctx.linear.reference import convolved, delta_sums
from longctx.sequence import Documents

TAPS = 4  # of the short convolutions, where the model does not say
SMALLEST = 1e-6  # what a squared length is at least, nearly


def tokens(widths: HeadDims) -> dict[str, int]:
    return {**plain_tokens(widths), "a": 1, "b": 1}


def parameters(widths: HeadDims, taps: int = TAPS) -> dict[str, tuple[int, ...]]:
    kernels = {f"{name}_conv": (channels, taps) for name, channels in plain_tokens(widths).items()}
    return {"A_log": (), "dt_bias": (), **kernels}


def fill(name: str, parameter: Tensor, generator: Generator) -> None:
    if name.endswith("_conv"):
        bound = parameter.shape[-1] ** -0.5
        parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    else:
        fill_gate(name, parameter, generator)


def unit(x: Tensor) -> Tensor:
    """Scales rows to length 1, in the accumulation dtype: keys of other lengths make the delta rule explode."""
    in_acc_dtype = x.to(accumulation_dtype(x.dtype))
    return (in_acc_dtype * (in_acc_dtype.square().sum(-1, keepdim=True) + SMALLEST).rsqrt()).to(x.dtype)


def mix(x: Inputs, core: LinearCore, plan: Tensor, strength: float = 1.0) -> Tensor:
    """Maps the inputs as ``Mixer`` says; ``strength``: of a write at most."""
    # Channels are convolved one by one, whatever head they are of: so heads need not be as many.
    channels = [x[name].flatten(2).unsqueeze(2) for name in "qkv"]
    kernels = [x[f"{name}_conv"].flatten(0, 1).unsqueeze(0) for name in "qkv"]
    convolved_channels = core.convolve(channels, kernels, plan)
    q, k, v = (F.silu(y).view(x[name].shape) for name, y in zip("qkv", convolved_channels, strict=True))
    q, k = (_to_values(y, v) for y in (unit(q) * q.shape[-1] ** -0.5, unit(k)))
    beta = strength * x["b"].squeeze(-1).sigmoid()
    return core.attend(q, k, v, plan, log_decay=log_decay(x), beta=beta)


def _to_values(x: Tensor, v: Tensor) -> Tensor:
    """Repeats each head of x for the consecutive heads of values that it serves."""
    return x if x.shape[2] == v.shape[2] else x.repeat_interleave(v.shape[2] // x.shape[2], 2)


def recurrence(x: Inputs, documents: Sequence[Documents], strength: float = 1.0) -> Tensor:
    mixed = (convolved(x[name], x[f"{name}_conv"], documents) for name in "qkv")
    q, k, v = (y / (1 + torch.exp(-y)) for y in mixed)
    q, k = (y / (y.square().sum(-1, keepdim=True) + SMALLEST).sqrt() for y in (q, k))
    of_value = torch.arange(v.shape[2], device=v.device) * q.shape[2] // v.shape[2]
    decay = torch.exp(-x["A_log"].exp() * (1 + (x["a"][..., 0] + x["dt_bias"]).exp()).log())
    beta = strength / (1 + torch.exp(-x["b"][..., 0]))
    return delta_sums(q[:, :, of_value], k[:, :, of_value], v, decay, beta, documents) / q.shape[-1] ** 0.5


def sized(conv_taps: int = TAPS, negative_eigenvalues: bool = False) -> Mixer:
    """Returns the mixer with filters of so many taps, and with writes of twice the strength where asked."""
    strength = 2.0 if negative_eigenvalues else 1.0
    return replace(
        MIXER,
        parameters=partial(parameters, taps=conv_taps),
        mix=partial(mix, strength=strength),
        recurrence=partial(recurrence, strength=strength),
    )


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
    reads=frozenset(
        ("key_heads", "value_heads", "key_head_dim", "value_head_dim", "conv_taps", "negative_eigenvalues")
    ),
    sized=sized,
    grouped=frozenset(("q", "k", "q_conv", "k_conv")),
)
