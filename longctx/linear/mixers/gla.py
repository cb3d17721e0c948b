"""Gated linear attention decides for each token how much of every channel of the state stays.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024). Their gates come from a
projection of low rank; here the block projects them as it does queries.

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T        o_t = q_t S_t / sqrt(K)        a_t = sigmoid(g_t)^(1/16)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.mixer import (
    HeadDims,
    Inputs,
    LinearCore,
    Mixer,
    no_constants,
    no_parameters,
    nothing_to_fill,
    plain_tokens,
    scan_flops,
)
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents

TEMPERATURE = 16


def tokens(widths: HeadDims) -> dict[str, int]:
    return {**plain_tokens(widths), "g": widths.key}


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    log_decay = F.logsigmoid(x["g"].to(accumulation_dtype(x["g"].dtype))) / TEMPERATURE
    return core.attend(x["q"] * x["q"].shape[-1] ** -0.5, x["k"], x["v"], plan, log_decay=log_decay)


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    decay = x["g"].sigmoid() ** (1 / TEMPERATURE)
    return decayed_sums(x["q"], x["k"], x["v"], decay, documents) / x["q"].shape[-1] ** 0.5


MIXER = Mixer(
    name="gla",
    tokens=tokens,
    parameters=no_parameters,
    constants=no_constants,
    initial=nothing_to_fill,
    mix=mix,
    recurrence=recurrence,
    normed=True,
    flops=scan_flops,
    transition="diagonal",
)
