"""The decoder: embedding, blocks, final norm, and a loss that never holds the logits of a long sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.attention import CoreAttention
from longctx.config import ModelConfig
from longctx.model.block import Block
from longctx.model.loss import cross_entropy_sum
from longctx.model.rotary import rotation_of


class Vocabulary:
    """How hidden states ``[B, T/SP, dim]`` meet the head's weight ``[V, dim]``, all of it being here."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    def loss_sum(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        return cross_entropy_sum(hidden.flatten(0, 1), weight, labels.flatten(), chunk)


class Decoder(nn.Module):
    """A Llama-style decoder in its configuration's sizes.

    ``loss_chunk``: tokens whose logits exist at one time. Parameters are made in torch's default dtype on its
    default device; ``initialize`` gives them their values.
    """

    def __init__(self, config: ModelConfig, attention: CoreAttention | None = None, loss_chunk: int = 1024) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = loss_chunk
        self.vocabulary = Vocabulary()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        if attention is not None:
            self.set_attention(attention)

    @property
    def layers(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.blocks)

    def set_attention(self, attention: CoreAttention) -> None:
        """Gives every block the object that computes its core attention."""
        for block in self.layers:
            block.attention = attention

    def forward(self, tokens: Tensor, positions: Tensor, plan: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, positions and labels: int64 ``[B, T/SP]``; ``plan``: handle of the batch's sequence plan.

        With labels: the sum (not the mean) of the cross-entropy over this rank's valid tokens, a scalar in
        fp32 (fp64 for fp64). Without: logits ``[B, T/SP, V]``.
        """
        x = self.embedding(tokens)
        dtype = torch.promote_types(x.dtype, torch.float32)
        rotation = rotation_of(positions, self.config.head_dim, self.config.rope_theta, dtype)
        for block in self.blocks:
            x = block(x, rotation, plan)
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if labels is None:
            return self.vocabulary.logits(x, weight)
        return self.vocabulary.loss_sum(x, weight, labels, self.loss_chunk)
