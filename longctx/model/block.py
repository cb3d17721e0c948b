"""One layer in three parts: up to what tokens exchange, the exchange, and the rest.

The parts are apart because attention is the only place where ranks talk about the sequence: whoever owns the
layer loop may put other work between ``start`` and ``finish``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.model.rotary import Rotation, apply_rotary


class Block(nn.Module, ABC):
    """Pre-norm mixing of tokens, which a subclass says, and SwiGLU.

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
        """x ``[B, T/SP, dim]`` to what its tokens read of one another, ``[B, T/SP, H/TP, D]``."""

    def post(self, o: Tensor, x: Tensor) -> Tensor:
        """What tokens read, o ``[B, T/SP, H/TP, D]``, and the block's input x ``[B, T/SP, dim]`` to its output."""
        return self.mlp(x + self.attention_out(o.flatten(-2)))

    def mlp(self, x: Tensor) -> Tensor:
        """The second half, residual included: each token's by itself, so that tokens may come in parts."""
        y = self.mlp_norm(x)
        out: Tensor = x + self.mlp_out(F.silu(self.gate(y)) * self.up(y))
        return out

    def forward(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        """x ``[B, T/SP, dim]`` to the same shape; ``plan``: the handle of the batch's sequence plan."""
        return self.post(self.mix_tokens(x, rotation, plan), x)


class SoftmaxBlock(Block):
    """Softmax attention with rotary positions and grouped heads; its core is a ``CoreAttention``."""

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
        """x ``[B, T/SP, dim]`` to q ``[B, T/SP, H/TP, D]`` and k, v ``[B, T/SP, Hkv/TP, D]``."""
        x = self.attention_norm(x)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        return apply_rotary(self.q_norm(q), rotation), apply_rotary(self.k_norm(k), rotation), v

    def mix_tokens(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        assert self.attention is not None, "Decoder.set_attention comes before the first forward pass"
        q, k, v = self.pre(x, rotation)
        out: Tensor = self.attention.finish(self.attention.start(q, k, v, plan))
        return out
