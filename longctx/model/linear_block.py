"""Defines a layer of linear attention, which projects hidden states to whatever its mixer asks for.

A mixer (``longctx.linear.mixers``) names its inputs; the block owns the weights that make them, norms and gates what
comes out. Positions are in the mixer's decay or in the order of its writes, so nothing is rotated.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.linear import HeadDims, Inputs, LinearCore, Mixer, get_mixer
from longctx.model.block import Block
from longctx.model.rotary import Rotation

LINEAR = "L"  # its letter in model.pattern


def mixer_of(config: ModelConfig) -> Mixer:
    """Returns the mixer of the model's linear layers."""
    assert config.mixer is not None, "a pattern with linear layers has a mixer"
    return get_mixer(config.mixer, **config.mixer_sizes)


class LinearBlock(Block):
    """Layer number ``layer`` of a decoder, which mixes tokens by linear attention; a ``LinearCore`` computes its core.

    Heads are those of ``model.linear``; inputs that the mixer calls grouped come by its key heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        heads = config.linear_heads
        super().__init__(config, LINEAR, heads.values, bias=False)
        self.attention: LinearCore | None
        self.mixer = mixer_of(config)
        widths = HeadDims(heads.key_head_dim, heads.value_head_dim)

        def heads_of(name: str) -> int:
            return heads.key_heads if name in self.mixer.grouped else heads.value_heads

        self._channels = self.mixer.tokens(widths)
        self.projections = nn.ModuleDict(
            {
                name: nn.Linear(config.dim, heads_of(name) * channels, bias=False)
                for name, channels in self._channels.items()
            }
        )
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(self.attention_out.weight.new_empty(heads_of(name), *shape))
                for name, shape in self.mixer.parameters(widths).items()
            }
        )
        self.own_heads = slice(None)  # of those that are fixed, where ranks have some each
        self._make_fixed = partial(self.mixer.constants, heads.value_heads, layer, config.layers)
        fixed = self._make_fixed()
        self._fixed = tuple(fixed)
        for name, value in fixed.items():
            self.register_buffer(f"fixed_{name}", value, persistent=False)
        # Released models store its weight whole, also where their other norms are stored as what they exceed 1 by.
        eps = config.linear.norm_eps or config.norm_eps
        self.out_norm = nn.RMSNorm(heads.value_head_dim, eps) if self.mixer.normed else nn.Identity()
        self.out_gate = nn.Linear(config.dim, heads.values, bias=False)

    def head_tensors(self) -> dict[str, Tensor]:
        """Returns what is learned or fixed of each head, ``[H/TP, ...]``."""
        return {**self.learned, **{name: getattr(self, f"fixed_{name}") for name in self._fixed}}

    def fill_fixed(self) -> None:
        """Computes again what is fixed of each head, which a model without storage has not kept."""
        with torch.device("cpu"):
            fixed = self._make_fixed()
        for name, value in fixed.items():
            getattr(self, f"fixed_{name}").copy_(value[self.own_heads])

    def mix(self, inputs: Inputs, plan: Tensor) -> Tensor:
        """Returns what the mixer makes of its inputs, ``[B, T/SP, H/TP, D]``."""
        assert self.attention is not None, "Decoder.set_attention comes before the first forward pass"
        return self.mixer.mix(inputs, self.attention, plan)

    def mix_tokens(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        x = self.attention_norm(x)
        inputs = {
            name: project(x).unflatten(-1, (-1, self._channels[name])) for name, project in self.projections.items()
        }
        out = self.out_norm(self.mix({**inputs, **self.head_tensors()}, plan))
        return out * F.silu(self.out_gate(x)).view_as(out)
