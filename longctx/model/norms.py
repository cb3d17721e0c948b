"""Norms that a family has in place of a plain RMSNorm."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig


class PlusOneNorm(nn.RMSNorm):
    """An RMSNorm whose weight is stored as what it exceeds 1 by, as Gemma and Qwen 3.5 have it."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "it has a weight"
        return F.rms_norm(x, self.normalized_shape, self.weight + 1.0, self.eps)


def make_norm(config: ModelConfig, width: int, wanted: bool = True) -> Any:
    """Makes the model's norm over ``width`` channels; what passes everything on where it is not ``wanted``."""
    if not wanted:
        return nn.Identity()
    return (PlusOneNorm if config.norm_plus_one else nn.RMSNorm)(width, config.norm_eps)
