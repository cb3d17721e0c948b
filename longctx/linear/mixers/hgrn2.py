"""HGRN2 writes into a channel of the state as much as it forgets there.

Qin et al., "HGRN2: Gated Linear RNNs with State Expansion" (2024). Its lower bounds of the forget gate grow with the
depth and are learned there. Here they are fixed at the values that learning starts from.

    f_t = l / L + (1 - l / L) sigmoid(x_t)        layer l of L
    S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T     o_t = silu(q_t) S_t
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention.runtime.partial import accumulation_dtype
from longctx.linear.mixer import HeadDims, Inputs, LinearCore, Mixer, no_parameters, nothing_to_fill, scan_flops
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents

LEAST = -80.0  # of a gate: all is forgotten long before, and fp32 knows no smaller sigmoid


def tokens(widths: HeadDims) -> dict[str, int]:
    return {"q": widths.key, "f": widths.key, "v": widths.value}


def bounds(heads: int, layer: int, layers: int) -> dict[str, Tensor]:
    """Returns the lower bound of every head's forget gate, fp64 ``[H]``: the same in each."""
    return {"floor": torch.full((heads,), layer / layers, dtype=torch.float64)}


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    acc_dtype = accumulation_dtype(x["f"].dtype)
    floor = x["floor"].to(acc_dtype).unsqueeze(-1)
    gate = x["f"].to(acc_dtype).clamp(min=LEAST)
    written = (1 - floor) * torch.sigmoid(-gate)
    # Each by what it is near to: where little is forgotten, 1 - f keeps the digits, otherwise f does.
    little = torch.log1p(-written.clamp(max=0.5))
    log_decay = torch.where(written < 0.5, little, (floor + (1 - floor) * torch.sigmoid(gate)).log())
    return core.attend(F.silu(x["q"]), written.to(x["q"].dtype), x["v"], plan, log_decay=log_decay)


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    floor = x["floor"].unsqueeze(-1)
    forget = floor + (1 - floor) / (1 + torch.exp(-x["f"]))
    q = x["q"] / (1 + torch.exp(-x["q"]))
    return decayed_sums(q, 1 - forget, x["v"], forget, documents)


MIXER = Mixer(
    name="hgrn2",
    tokens=tokens,
    parameters=no_parameters,
    constants=bounds,
    initial=nothing_to_fill,
    mix=mix,
    recurrence=recurrence,
    normed=True,
    flops=scan_flops,
    transition="diagonal",
)
