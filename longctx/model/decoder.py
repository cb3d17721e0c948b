"""Defines the decoder: embedding, blocks, final norm, and a loss that never holds all logits of a long sequence."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.attention import CoreAttention
from longctx.config import ModelConfig
from longctx.linear import LinearCore
from longctx.model.block import Block, SoftmaxBlock
from longctx.model.linear_block import LINEAR, LinearBlock
from longctx.model.loss import cross_entropy_sum
from longctx.model.norms import make_norm
from longctx.model.rotary import Rotation, rotations
from longctx.sequence import NO_PLAN, plan_of


class Vocabulary:
    """Computes logits or loss from hidden states ``[B, T/SP, dim]`` and the whole head's weight ``[V, dim]``."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    def loss_sum(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        return cross_entropy_sum(hidden.flatten(0, 1), weight, labels.flatten(), chunk)

    def loss_or_logits(self, hidden: Tensor, weight: Tensor, labels: Tensor | None, chunk: int) -> Tensor:
        """Returns the summed loss, or without labels the logits."""
        return self.logits(hidden, weight) if labels is None else self.loss_sum(hidden, weight, labels, chunk)


class Head(nn.Linear):
    """An untied head that holds the weight ``[V, dim]``.

    It is called like any module, so that whoever gathers weights around calls sees when this one is needed.
    """

    def forward(self, x: Tensor, vocabulary: Vocabulary, labels: Tensor | None, chunk: int) -> Tensor:  # type: ignore[override]
        return vocabulary.loss_or_logits(x, self.weight, labels, chunk)


@dataclass(frozen=True)
class Part:
    """Consecutive layers that a decoder keeps.

    The first part also embeds, the last has the norm, the head and the loss.
    """

    layers: range
    first: bool = True
    last: bool = True


def make_block(config: ModelConfig, layer: int) -> Block:
    """Makes layer number ``layer``, of the kind that the pattern gives it."""
    kind = config.kinds[layer]
    return LinearBlock(config, layer) if kind == LINEAR else SoftmaxBlock(config, kind)


class Decoder(nn.Module):
    """A Llama-style decoder that has its configuration's sizes and pattern of layers, or a part of one.

    ``loss_chunk``: tokens whose logits exist at one time. Parameters are made in torch's default dtype on its default
    device; ``initialize`` gives them their values. Parameters of a part have their names in the whole.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: CoreAttention | None = None,
        loss_chunk: int = 1024,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = loss_chunk
        self.vocabulary = Vocabulary()
        self.part = part = part or Part(range(config.layers))
        tied, embeds = config.tie_embeddings, part.first or (part.last and config.tie_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.dim) if embeds else None
        self.blocks = nn.ModuleList()
        for layer in part.layers:
            self.blocks.add_module(str(layer), make_block(config, layer))
        self.norm = make_norm(config, config.dim) if part.last else None
        headed = part.last and not tied
        self.head = Head(config.dim, config.vocab_size, bias=False) if headed else None
        if attention is not None:
            self.set_attention(attention)

    @property
    def layers(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.blocks)

    def set_attention(self, attention: CoreAttention | None, linear: LinearCore | None = None) -> None:
        """Sets what computes the core of every block: ``attention`` for softmax layers, ``linear`` for linear ones."""
        for block in self.layers:
            block.attention = linear if isinstance(block, LinearBlock) else attention

    def make_room(self, device: torch.device) -> None:
        """Gives a model that was made without storage its memory; parameters hold anything, what is fixed its values.

        Parameters may be sharded already.
        """
        self.to_empty(device=device)
        for block in self.layers:
            if isinstance(block, LinearBlock):
                block.fill_fixed()

    def cut(self, part: Part) -> Decoder:
        """Returns the same decoder with only ``part`` kept.

        Modules are shared, but for an embedding that the head uses too: where the head is in another part it gets a
        copy.
        """
        with torch.device("meta"):
            kept = Decoder(self.config, loss_chunk=self.loss_chunk, part=part)
        for name in list(kept.blocks._modules):
            kept.blocks._modules[name] = self.blocks._modules[name]
        if kept.embedding is not None:
            kept.embedding = self.embedding if part.first else copy.deepcopy(self.embedding)
        kept.norm = self.norm if part.last else None
        kept.head = self.head if part.last else None
        return kept

    def forward(self, x: Tensor, positions: Tensor, plan: Tensor, labels: Tensor | None = None) -> Tensor:
        """Computes the summed loss of tokens, their logits, or the hidden states that the next part takes.

        x: tokens, int64 ``[B, T/SP]``; in a later part the hidden states ``[B, T/SP, dim]`` of the part before it.
        positions and labels: int64 ``[B, T/SP]``. ``plan``: handle of the batch's sequence plan.

        With labels it returns the sum (not the mean) of the cross-entropy over this rank's valid tokens: a scalar in
        fp32 (fp64 for fp64). Without labels it returns logits ``[B, T/SP, V]``. A part that is not the last returns its
        hidden states, whether it is given labels or not.
        """
        if self.part.first:
            assert self.embedding is not None, "the first part embeds"
            x = self.embedding(x)
            if self.config.embedding_scale != 1.0:
                # Rounded as the weights are: families that scale embeddings were trained so.
                x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype).item()
        rotation = self.rotations(positions, x.dtype)
        plans = self._plans(plan)
        for block in self.layers:
            x = block(x, rotation[block.kind], plans[block.kind])
        return self._end(x, labels) if self.norm is not None else x

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Rotation]:
        """Computes what turns queries and keys of ``dtype`` at int64 ``positions`` ``[B, T/SP]``, by kind of layers."""
        return rotations(positions, self.config, torch.promote_types(dtype, torch.float32))

    def _plans(self, plan: Tensor) -> dict[str, Tensor]:
        """Returns the handle of the plan that each kind of layers computes by; a window has one of its own."""
        handles = dict.fromkeys(self.config.pattern, plan)
        if self.config.window is not None and int(plan) != NO_PLAN:
            handles["W"] = plan_of(plan).windowed(self.config.window).handle
        return handles

    def _end(self, x: Tensor, labels: Tensor | None) -> Tensor:
        assert self.norm is not None, "the last part has the norm"
        x = self.norm(x)
        if self.config.logit_scale != 1.0:
            x = x * self.config.logit_scale
        if self.head is not None:
            out: Tensor = self.head(x, self.vocabulary, labels, self.loss_chunk)
            return out
        assert self.embedding is not None, "the last part has a head, or the embedding that is tied to it"
        return self.vocabulary.loss_or_logits(x, self.embedding.weight, labels, self.loss_chunk)
