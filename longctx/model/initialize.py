"""Draws initial weights as a function of (seed, parameter's name, its shape), whatever the mesh."""

from __future__ import annotations

import hashlib
import math

import torch

from longctx.model.decoder import Decoder
from longctx.model.linear_block import mixer_of
from longctx.model.norms import PlusOneNorm

# These write into the residual stream, which sums 2 * layers of them.
OUTPUT_PROJECTIONS = ("attention_out", "mlp_out")
LEARNED = "learned"  # of a linear block: what is no projection


def initialize(model: Decoder, seed: int) -> None:
    """Fills matrices from a normal distribution with ``init_std`` biases with 0, norms with 1.

    Output projections are narrower by sqrt(2 * layers). What a mixer learns of each head starts as the mixer says.
    Every parameter has a generator of its own, so that none depends on which others are here. All are drawn on the CPU
    in fp32, whatever the device and dtype they end in.
    """
    config = model.config
    less_one = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PlusOneNorm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, own_name = name.split(".")[-2:]
            drawn = torch.empty(parameter.shape)
            if owner == LEARNED:
                mixer_of(config).initial(own_name, drawn, _generator(seed, name))
            elif own_name == "bias":
                drawn.zero_()
            elif parameter.ndim < 2:
                drawn.fill_(0.0 if name in less_one else 1.0)
            else:
                std = config.init_std
                if owner in OUTPUT_PROJECTIONS:
                    std /= math.sqrt(2 * config.layers)
                drawn.normal_(0.0, std, generator=_generator(seed, name))
            parameter.copy_(drawn)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
