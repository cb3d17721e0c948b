"""Compares a step on a mesh with the dense step: the errors, and how large they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

# Largest relative error. fp32 and fp64 allow for sums in another order, bf16 for rounding after every operation. Over
# head counts from 4 to 64 and head dims from 8 to 128 the worst tensor in bf16 was off by 1.6e-2.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 4e-2}
# A gradient's error is taken relative to its own norm plus this share of the whole gradient's norm. The gradients of
# norm layers are small sums of large terms and would measure rounding alone.
FLOOR = 2e-2


def tolerance_of(dtype: str, layers: int) -> float:
    """Returns the largest relative error that a run of so many layers may have.

    Roundings of one layer after another add up like a random walk; only for bf16 does that come near the limit.
    """
    return TOLERANCES[dtype] * (math.sqrt(layers) if dtype == "bfloat16" else 1.0)


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Returns the norm of the difference over the expected norm plus ``floor``; infinite for what is not finite."""
    error = float((found - expected).norm() / (expected.norm() + floor))
    return error if math.isfinite(error) else math.inf


def gradient_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the relative error of each parameter's gradient."""
    floor = FLOOR * math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    return {name: relative(found[name], gradient, floor) for name, gradient in expected.items()}
