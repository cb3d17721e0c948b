"""Defines a layer of linear attention, which projects hidden states to whatever its mixer asks for.

A mixer (``longctx.linear.mixers``) names its inputs; the block owns the weights that make them, norms and gates what
comes out. Positions are in the mixer's decay or in the order of its writes, so nothing is rotated.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.linear import HeadDims, Inputs, LinearCore, Mixer, get_mixer
from longctx.model.block import Block
from longctx.model.norms import make_norm
from longctx.model.rotary import Rotation


def mixer_of(config: ModelConfig) -> Mixer:
    """Returns the mixer of the model's linear layers."""
    assert config.mixer is not None, "a pattern with linear layers has a mixer"
    return get_mixer(config.mixer, **config.mixer_sizes)


class LinearBlock(Block):
    """Layer number ``layer`` of a decoder, which mixes tokens by linear attention; a ``LinearCore`` computes its core.

    All heads have keys and values of their own.
    """

    kind = "L"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        self.attention: LinearCore | None
        self.mixer = mixer_of(config)
        widths = HeadDims(config.head_dim, config.head_dim)
        self._channels = self.mixer.tokens(widths)
        self.projections = nn.ModuleDict(
            {
                name: nn.Linear(config.dim, config.heads * channels, bias=False)
                for name, channels in self._channels.items()
            }
        )
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(self.attention_out.weight.new_empty(config.heads, *shape))
                for name, shape in self.mixer.parameters(widths).items()
            }
        )
        fixed = self.mixer.constants(config.heads, layer, config.layers)
        self._fixed = tuple(fixed)
        for name, value in fixed.items():
            self.register_buffer(f"fixed_{name}", value, persistent=False)
        self.out_norm = make_norm(config, config.head_dim, self.mixer.normed)
        self.out_gate = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)

    def head_tensors(self) -> dict[str, Tensor]:
        """Returns what is learned or fixed of each head, ``[H/TP, ...]``."""
        return {**self.learned, **{name: getattr(self, f"fixed_{name}") for name in self._fixed}}

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
