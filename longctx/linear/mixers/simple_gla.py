"""Simple GLA decides for each token how much of every head's state stays, by the gate of Mamba-2.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024), with one gate a head. The
gate is that of Dao and Gu, "Transformers are SSMs" (2024).

    S_t = a_t S_{t-1} + k_t v_t^T        o_t = q_t S_t / sqrt(K)        log a_t = -e^A softplus(x_t + dt)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.mixer import (
    HeadDims,
    Inputs,
    LinearCore,
    Mixer,
    fill_gate,
    no_constants,
    plain_tokens,
    scan_flops,
)
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents


def tokens(widths: HeadDims) -> dict[str, int]:
    return {**plain_tokens(widths), "a": 1}


def parameters(widths: HeadDims) -> dict[str, tuple[int, ...]]:
    return {"A_log": (), "dt_bias": ()}


def log_decay(x: Inputs) -> Tensor:
    """Returns the log decay of each token and head, ``[B, T/SP, H/TP]``, in the accumulation dtype."""
    a, rate, step = (x[name].to(accumulation_dtype(x["a"].dtype)) for name in ("a", "A_log", "dt_bias"))
    return -rate.exp() * F.softplus(a.squeeze(-1) + step)


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    return core.attend(x["q"] * x["q"].shape[-1] ** -0.5, x["k"], x["v"], plan, log_decay=log_decay(x))


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    decay = torch.exp(-x["A_log"].exp() * (1 + (x["a"][..., 0] + x["dt_bias"]).exp()).log())
    return decayed_sums(x["q"], x["k"], x["v"], decay.unsqueeze(-1), documents) / x["q"].shape[-1] ** 0.5


MIXER = Mixer(
    name="simple_gla",
    tokens=tokens,
    parameters=parameters,
    constants=no_constants,
    initial=fill_gate,
    mix=mix,
    recurrence=recurrence,
    normed=True,
    flops=scan_flops,
    transition="scalar",
)
