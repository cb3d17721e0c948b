"""Defines one layer in three parts: before attention, attention itself, and after it.

The parts are apart because attention is the only place where ranks exchange tokens. Whoever owns the layer loop may
put other work between ``start`` and ``finish``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.model.rotary import Rotation, apply_rotary


class Block(nn.Module, ABC):
    """A pre-norm layer that mixes tokens, as a subclass defines, and applies a SwiGLU MLP.

    ``attention``: what computes the core of the mixing, set from outside before the first forward pass.
    """

    kind: str  # of ``ModelConfig.pattern``

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.head_dim
        self.attention: Any = None
        self.head_dim = head_dim
        self.attention_norm = nn.RMSNorm(dim, config.norm_eps)
        self.attention_out = nn.Linear(config.heads * head_dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, config.norm_eps)
        self.gate = nn.Linear(dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(dim, config.hidden_dim, bias=False)
        self.mlp_out = nn.Linear(config.hidden_dim, dim, bias=False)

    @abstractmethod
    def mix_tokens(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        """Maps x ``[B, T/SP, dim]`` to what its tokens read of one another, ``[B, T/SP, H/TP, D]``."""

    def post(self, o: Tensor, x: Tensor) -> Tensor:
        """Maps what tokens read and the block's input to the block's output ``[B, T/SP, dim]``.

        o: ``[B, T/SP, H/TP, D]``. x: the block's input, ``[B, T/SP, dim]``.
        """
        return self.mlp(x + self.attention_out(o.flatten(-2)))

    def mlp(self, x: Tensor) -> Tensor:
        """Applies the second half of the block, residual included.

        Each token is computed by itself, so tokens may come in parts.
        """
        y = self.mlp_norm(x)
        out: Tensor = x + self.mlp_out(F.silu(self.gate(y)) * self.up(y))
        return out

    def forward(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        """Maps x ``[B, T/SP, dim]`` to the same shape; ``plan`` is the handle of the batch's sequence plan."""
        return self.post(self.mix_tokens(x, rotation, plan), x)


class SoftmaxBlock(Block):
    """A layer of softmax attention with rotary positions and grouped heads; a ``CoreAttention`` computes its core."""

    kind = "S"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim, head_dim = config.dim, config.head_dim
        self.q = nn.Linear(dim, config.heads * head_dim, bias=False)
        self.k = nn.Linear(dim, config.kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, config.kv_heads * head_dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def pre(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Projects x ``[B, T/SP, dim]`` to q ``[B, T/SP, H/TP, D]`` and k, v ``[B, T/SP, Hkv/TP, D]``."""
        x = self.attention_norm(x)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        return apply_rotary(self.q_norm(q), rotation), apply_rotary(self.k_norm(k), rotation), v

    def mix_tokens(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        assert self.attention is not None, "Decoder.set_attention comes before the first forward pass"
        q, k, v = self.pre(x, rotation)
        out: Tensor = self.attention.finish(self.attention.start(q, k, v, plan))
        return out
