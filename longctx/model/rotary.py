"""Rotates queries and keys (Su et al. 2021) by positions that travel with the tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longctx.config import ModelConfig
from longctx.config.sections.rope import RopeConfig
from longctx.rope import Table

# Cosine and sine of each token's angles, [B, T/SP, 1, D/2] of the channels that turn; None where none do.
Rotation = tuple[Tensor, Tensor] | None


def rotations(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> dict[str, Rotation]:
    """Computes the rotation of each kind of softmax layers, once per forward pass for all of them.

    ``positions``: int64 ``[B, T/SP]``. ``dtype``: of cosine and sine, and of the rotation.
    """
    sections = {kind: config.rope_of(kind) for kind in dict.fromkeys(config.pattern)}
    made = {
        section: rotation_of(positions, _table(section, config.rope_theta, config.head_dim), dtype)
        for section in dict.fromkeys(sections.values())
    }
    return {kind: made[section] for kind, section in sections.items()}


_table = lru_cache(RopeConfig.table)


def rotation_of(positions: Tensor, table: Table, dtype: torch.dtype) -> Rotation:
    """Computes cosine and sine of the angles of int64 positions ``[B, T/SP]``.

    Angles are taken in fp64: at position 10^6 an fp32 angle is off by 0.06 rad in the fastest channel.
    """
    if not table.rotated:
        return None
    # So few numbers are copied without waiting for the device.
    frequencies = torch.tensor(table.frequencies, dtype=torch.float64).to(positions.device, non_blocking=True)
    angles = positions[:, :, None, None].double() * frequencies
    return (angles.cos() * table.factor).to(dtype), (angles.sin() * table.factor).to(dtype)


def apply_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates channel pairs (i, i + D/2) of x ``[B, T/SP, H/TP, D]``, the order of Hugging Face's Llama.

    Where only the first channels turn, D is their number, and the others pass.
    """
    if rotation is None:
        return x
    cosine, sine = rotation
    turned = 2 * cosine.shape[-1]
    first, second = x[..., :turned].to(cosine.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
    return rotated if turned == x.shape[-1] else torch.cat((rotated, x[..., turned:]), dim=-1)
