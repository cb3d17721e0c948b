"""Linear attention replaces softmax's exponential by a product of features, so that keys and values sum up to a state.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020), with their
features f(x) = elu(x) + 1.

    S_t = S_{t-1} + f(k_t) [v_t, 1]^T        [y, z] = f(q_t) S_t        o_t = y / z

The normaliser is one more column of the values, so it needs no state and no message of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.linear.mixer import (
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


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    q, k, v = F.elu(x["q"]) + 1, F.elu(x["k"]) + 1, x["v"]
    return normalised(q, k, v, core, plan)


def normalised(q: Tensor, k: Tensor, v: Tensor, core: LinearCore, plan: Tensor) -> Tensor:
    """Returns means of the values, weighted by products of positive features q, k ``[B, T/SP, H/TP, any]``."""
    extended = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    y, z = core.attend(q, k, extended, plan).split([v.shape[-1], 1], -1)
    return y / z.masked_fill(z == 0, 1)  # 0 on padding alone


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    q, k = (torch.where(x[name] > 0, x[name] + 1, x[name].exp()) for name in ("q", "k"))
    stays = torch.ones_like(q[..., :1])
    weighted, weights = (decayed_sums(q, k, v, stays, documents) for v in (x["v"], stays))
    return weighted / torch.where(weights == 0, 1, weights)


MIXER = Mixer(
    name="basic",
    tokens=plain_tokens,
    parameters=no_parameters,
    constants=no_constants,
    initial=nothing_to_fill,
    mix=mix,
    recurrence=recurrence,
    normed=False,
    flops=scan_flops,
    transition="none",
)
