"""Defines one layer in three parts: before attention, attention itself, and after it.

The parts are apart because attention is the only place where ranks exchange tokens. Whoever owns the layer loop may
put other work between ``start`` and ``finish``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.model.norms import make_norm
from longctx.model.rotary import Rotation, apply_rotary

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Block(nn.Module, ABC):
    """A layer that mixes tokens, as a subclass defines, and applies a gated MLP, each a branch beside the residual.

    A branch is normed before, after, or both, as ``model.norm`` says. ``attention``: what computes the core of the
    mixing, set from outside before the first forward pass. ``kind``: the layer's letter in ``model.pattern``.
    ``width``: channels of what its heads read, all together; ``bias``: of the projection behind them.
    """

    def __init__(self, config: ModelConfig, kind: str, width: int, bias: bool) -> None:
        super().__init__()
        dim, norm = config.dim, config.norm_of(kind)
        before, after = norm != "post", norm != "pre"
        self.kind = kind
        self.attention: Any = None
        self.attention_norm = make_norm(config, dim, before)
        self.attention_out = nn.Linear(width, dim, bias=bias)
        self.attention_post_norm = make_norm(config, dim, after)
        self.mlp_norm = make_norm(config, dim, before)
        self.gate = nn.Linear(dim, config.hidden_dim, bias=config.mlp_bias)
        self.up = nn.Linear(dim, config.hidden_dim, bias=config.mlp_bias)
        self.mlp_out = nn.Linear(config.hidden_dim, dim, bias=config.mlp_bias)
        self.mlp_post_norm = make_norm(config, dim, after)
        self._activation = ACTIVATIONS[config.activation]

    @abstractmethod
    def mix_tokens(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        """Maps x ``[B, T/SP, dim]`` to what its tokens read of one another, ``[B, T/SP, H/TP, D]``."""

    def post(self, o: Tensor, x: Tensor) -> Tensor:
        """Maps what tokens read and the block's input to the block's output ``[B, T/SP, dim]``.

        o: ``[B, T/SP, H/TP, D]``. x: the block's input, ``[B, T/SP, dim]``.
        """
        return self.mlp(x + self.attention_post_norm(self.attention_out(o.flatten(-2))))

    def mlp(self, x: Tensor) -> Tensor:
        """Applies the second half of the block, residual included.

        Each token is computed by itself, so tokens may come in parts.
        """
        y = self.mlp_norm(x)
        out: Tensor = x + self.mlp_post_norm(self.mlp_out(self._activation(self.gate(y)) * self.up(y)))
        return out

    def forward(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        """Maps x ``[B, T/SP, dim]`` to the same shape; ``plan`` is the handle of the batch's sequence plan."""
        return self.post(self.mix_tokens(x, rotation, plan), x)


@dataclass(frozen=True)
class Projected:
    """Holds q and gate ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``; ``gate`` None: there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes."""
        return self.q, self.k, self.v

    def gated(self, out: Tensor) -> Tensor:
        """Lets through what the gate says of attention's output ``[B, T/SP, H/TP, D]``."""
        return out if self.gate is None else out * self.gate.sigmoid()


class SoftmaxBlock(Block):
    """A layer of softmax attention with rotary positions and grouped heads; a ``CoreAttention`` computes its core."""

    def __init__(self, config: ModelConfig, kind: str = "S") -> None:
        dim, head_dim, bias = config.dim, config.head_dim, config.attention_bias != "none"
        super().__init__(config, kind, config.heads * head_dim, config.attention_bias == "all")
        self.head_dim = head_dim
        self.gated = config.output_gate
        # With a gate each head's queries are followed by its gate.
        self.q = nn.Linear(dim, config.heads * head_dim * (2 if self.gated else 1), bias=bias)
        self.k = nn.Linear(dim, config.kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(dim, config.kv_heads * head_dim, bias=bias)
        self._norms_heads = config.qk_norm_dim == "head"
        widths = (head_dim, head_dim) if self._norms_heads else (config.heads * head_dim, config.kv_heads * head_dim)
        self.q_norm, self.k_norm = (make_norm(config, width, config.qk_norm) for width in widths)
        # Strategies multiply q·k by head_dim ** -0.5; what else the model asks for is in the queries.
        self._scale = None if config.query_scale is None else config.query_scale * head_dim**0.5

    def pre(self, x: Tensor, rotation: Rotation) -> Projected:
        """Projects x ``[B, T/SP, dim]`` to what attention takes, and to what gates its output."""
        y = self.attention_norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        gate: Tensor | None = None
        if self.gated:
            q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
            q = q.flatten(-2)
        if not self._norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self._norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
        return Projected(q if self._scale is None else q * self._scale, k, v, gate)

    def mix_tokens(self, x: Tensor, rotation: Rotation, plan: Tensor) -> Tensor:
        assert self.attention is not None, "Decoder.set_attention comes before the first forward pass"
        projected = self.pre(x, rotation)
        return projected.gated(self.attention.finish(self.attention.start(*projected.qkv, plan)))
