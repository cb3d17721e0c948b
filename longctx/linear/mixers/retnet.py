"""RetNet keeps a state that decays at a rate of its own in every head.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (2023), without its rotation of
queries and keys.

    S_t = g_h S_{t-1} + k_t v_t^T        o_t = q_t S_t / sqrt(K)        g_h = 1 - 2^(-5-h), head h
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.linear.mixer import Inputs, LinearCore, Mixer, no_parameters, nothing_to_fill, plain_tokens, scan_flops
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents


def rates(heads: int, layer: int, layers: int) -> dict[str, Tensor]:
    """Returns the log decay of each head, fp64 ``[H]``; it is the same in every layer."""
    return {"log_decay": torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float64))))}


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    return core.attend(x["q"] * x["q"].shape[-1] ** -0.5, x["k"], x["v"], plan, log_decay=x["log_decay"])


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    decay = x["log_decay"].exp().expand(x["q"].shape[:3]).unsqueeze(-1)
    return decayed_sums(x["q"], x["k"], x["v"], decay, documents) / x["q"].shape[-1] ** 0.5


MIXER = Mixer(
    name="retnet",
    tokens=plain_tokens,
    parameters=no_parameters,
    constants=rates,
    initial=nothing_to_fill,
    mix=mix,
    recurrence=recurrence,
    normed=True,
    flops=scan_flops,
    transition="constant",
)
