"""Counts what a layer's forward pass costs in FLOP; its backward pass costs twice as much."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.config import ModelConfig
from longctx.linear import HeadDims
from longctx.model.linear_block import mixer_of


@dataclass(frozen=True)
class LayerFlops:
    """What one layer's forward pass costs: FLOP per token, and per visible (query, key) ``pair`` of a softmax layer.

    A weight costs 2 FLOP per token, a pair two products of head_dim in every head.
    """

    softmax_weights: float
    pair: float
    linear_weights: float = 0.0
    linear_core: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, chunk: int) -> LayerFlops:
        """Counts the FLOP of a model's layers.

        ``chunk``: tokens that a linear layer computes at once.
        """
        width = model.heads * model.head_dim
        mlp = 3 * model.hidden_dim
        queries = width * (2 if model.output_gate else 1)
        softmax = 2.0 * model.dim * (queries + width + 2 * model.kv_heads * model.head_dim + mlp)
        pair = 4.0 * width
        if model.mixer is None:
            return cls(softmax, pair)
        mixer, heads = mixer_of(model), model.linear_heads
        widths = HeadDims(heads.key_head_dim, heads.value_head_dim)
        projected = sum(
            (heads.key_heads if name in mixer.grouped else heads.value_heads) * channels
            for name, channels in mixer.tokens(widths).items()
        )
        # Besides what the mixer reads: the gate of its output, and the projection behind it.
        linear = 2.0 * model.dim * (projected + 2 * heads.values + mlp)
        return cls(softmax, pair, linear, heads.value_heads * mixer.flops(widths, chunk))
