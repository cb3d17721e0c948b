"""Joins parameters to the tensors that ``transformers`` holds them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longctx.config import ModelConfig
from longctx.huggingface.names import PLAIN, Names, joined_shape, place_of


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Returns what joins these parameters."""
    if len(parts) == 1:
        return parts[0]
    shape = joined_shape([tuple(part.shape) for part in parts])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).reshape(shape)


def published_tensors(named: Mapping[str, Tensor], config: ModelConfig, names: Names = PLAIN) -> dict[str, Tensor]:
    """Returns tensors by the names of ``transformers``; ``named``: by our parameters' names, all parts of each."""
    places = {place_of(name, config, names) for name in named}
    return {place.name: joined([named[part] for part in place.parts]) for place in places}
