"""How ``transformers`` turns positions, by the model that it makes of a configuration, and how we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.config import ModelConfig
from longctx.huggingface.family import LAYER_TYPES
from longctx.model.rotary import rotations

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

Turned = dict[str, tuple[Tensor, Tensor]]


def theirs(directory: Path, length: int, kinds: str) -> Turned:
    """Cosine and sine at positions below ``length``, [L, channels], by kind of layers."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.no_grad():
        rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
        found: Turned = {}
        for kind in dict.fromkeys(kinds):
            by_layer: tuple[Any, ...] = (LAYER_TYPES[kind],) if isinstance(rotary.rope_type, dict) else ()
            cosine, sine = rotary(torch.zeros(1, length, 1), torch.arange(length)[None], *by_layer)
            found[kind] = (cosine[0], sine[0])
    return found


def ours(model: ModelConfig, length: int) -> Turned:
    """The same of our model, each pair's angle for both of its channels."""
    found = rotations(torch.arange(length)[None], model.settled(length), torch.float32)
    return {
        kind: (torch.cat((one[0], one[0]), -1)[0, :, 0], torch.cat((one[1], one[1]), -1)[0, :, 0])
        for kind, one in found.items()
        if one is not None
    }


def same(first: Turned, second: Turned) -> bool:
    """Whether both turn alike, up to the fp32 in which ``transformers`` takes angles."""
    return first.keys() == second.keys() and all(
        one.shape == other.shape and torch.allclose(one, other, atol=2e-4, rtol=0)
        for kind in first
        for one, other in zip(first[kind], second[kind], strict=True)
    )
