"""TransNormer with Lightning Attention fixes the decay of each head by its number and its layer's, without normaliser.

Qin et al., "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer" (2023), which gives the
slopes. "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models" (2024).

    S_t = e^-s S_{t-1} + k_t v_t^T        o_t = q_t S_t / sqrt(K)        q, k = silu(.)
    s = 2^(-8 (h+1) / H) (1 - l / (L-1) + 1e-5)        head h of H, layer l of L
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.linear.mixer import Inputs, LinearCore, Mixer, no_parameters, nothing_to_fill, plain_tokens, scan_flops
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents


def slopes(heads: int, layer: int, layers: int) -> dict[str, Tensor]:
    """Returns the log decay of each head, fp64 ``[H]``."""
    number = torch.arange(1, heads + 1, dtype=torch.float64)
    depth = 1 - layer / max(1, layers - 1) + 1e-5
    return {"log_decay": -(2.0 ** (-8 * number / heads)) * depth}


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    q, k = F.silu(x["q"]), F.silu(x["k"])
    return core.attend(q * q.shape[-1] ** -0.5, k, x["v"], plan, log_decay=x["log_decay"])


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    q, k = (x[name] / (1 + torch.exp(-x[name])) for name in ("q", "k"))
    decay = x["log_decay"].exp().expand(q.shape[:3]).unsqueeze(-1)
    return decayed_sums(q, k, x["v"], decay, documents) / q.shape[-1] ** 0.5


MIXER = Mixer(
    name="lightning",
    tokens=plain_tokens,
    parameters=no_parameters,
    constants=slopes,
    initial=nothing_to_fill,
    mix=mix,
    recurrence=recurrence,
    normed=True,
    flops=scan_flops,
    transition="constant",
)
