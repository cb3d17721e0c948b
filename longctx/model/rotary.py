"""Computes rotary position embeddings (Su et al. 2021) from positions that travel with the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosine and sine of each token's angles, [B, T/SP, 1, D/2]


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Returns cosine and sine of the angles of int64 positions ``[B, T/SP]``, once per forward pass for all layers.

    They are taken in fp64: at position 10^6 an fp32 angle is off by 0.06 rad in the fastest channel. ``dtype`` is what
    they are kept in, and what the rotation is computed in.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, :, None, None].double() * theta ** (-channels / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates channel pairs (i, i + D/2) of x ``[B, T/SP, H/TP, D]``, the order of Hugging Face's Llama."""
    cosine, sine = rotation
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(x.dtype)
