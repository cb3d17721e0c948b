"""Runs a decoder that remembers the sequence so far, in a cache sharded over a group of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import CoreAttention, StrategyAttention
from longctx.attention.decoding.cache import SequenceCache
from longctx.attention.decoding.tree_decoding import CachedAttention
from longctx.comm import broadcast, group_of
from longctx.errors import ConfigError
from longctx.model import Decoder, Vocabulary
from longctx.sequence import IGNORE, NO_PLAN, Batch, Documents, Layout, LocalBatch, Mask, SequencePlan, Zigzag, shard

_NO_PLAN = torch.tensor(NO_PLAN, dtype=torch.int64)  # new tokens are not cut


@dataclass(frozen=True)
class SequenceSharding:
    """Which ranks share the sequence, and how a prompt is sharded and computed.

    ``group``: None for this process alone. ``prefill``: what computes a prompt's attention; None for the ring.
    ``kernel``: of the new tokens' attention. All ranks of the group hold the model, have the same tokens and do the
    same steps. Where parameters are sharded over more ranks than the group, those must do as many steps as well.
    """

    group: dist.ProcessGroup | None = None
    prefill: CoreAttention | None = None
    layout: Layout = field(default_factory=Zigzag)
    mask: Mask = field(default_factory=Mask)
    kernel: str = "auto"


class DecodingSession:
    """Lends the model's layers an attention that keeps keys and values; on exit they get back their own.

    A prompt goes through ``prefill``, at most once and first; whatever follows through ``decode``, a few tokens at a
    time. Both give the same logits on every rank.
    """

    def __init__(self, model: Decoder, sharding: SequenceSharding) -> None:
        if not sharding.mask.causal:
            raise ConfigError("generation needs a causal mask: tokens cannot see those that do not exist yet")
        if not isinstance(model, Decoder) or not (model.part.first and model.part.last):
            raise ConfigError("generation needs the whole model on each rank; this is a part of a pipeline: set pp=1")
        if type(model.vocabulary) is not Vocabulary:
            raise ConfigError("generation does not run on a model whose tensors are split: set tp=1")
        if "L" in model.config.pattern:
            raise ConfigError(
                f"generation keeps keys and values, and model.pattern={model.config.pattern} has linear layers, which "
                "have a state instead; it runs on models of softmax layers (model.pattern=S)"
            )
        if model.config.window is not None:
            raise ConfigError(
                f"generation has one mask for all layers, and model.pattern={model.config.pattern} has layers of their "
                f"own window ({model.config.window}); it runs on models of one mask (model.pattern=S)"
            )
        self._model = model
        self._sharding = sharding
        self._group = group_of(sharding.group)
        self._device = next(model.parameters()).device
        self._sequences: int | None = None  # of the first tokens, and so of all that follow
        layers = list(model.layers)
        self._own = [block.attention for block in layers]
        self.cache = SequenceCache(self._group, sharding.mask, len(layers))
        whole = sharding.prefill or StrategyAttention("ring", sharding.group, sharding.kernel)
        for number, block in enumerate(layers):
            block.attention = CachedAttention(whole, self.cache, number, sharding.kernel)

    def __enter__(self) -> DecodingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for block, own in zip(self._model.layers, self._own, strict=True):
            block.attention = own

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Computes a prompt and returns the logits ``[B, V]`` of the token after it.

        tokens: int64 ``[B, S]``, whole on every rank.
        """
        batch, length = tokens.shape
        if not length:
            raise ConfigError("a prompt of 0 tokens has no next token; give at least 1, such as a begin-of-text token")
        if self.cache.length:
            raise ConfigError(
                f"a prompt comes first, and this session has {self.cache.length} tokens of each sequence; give what "
                "follows to decode, or open another session"
            )
        self._sequences = batch
        documents = (Documents.single(length),) * batch
        whole = Batch(tokens, torch.full_like(tokens, IGNORE), documents)
        local = shard(whole, self._sharding.layout, self._sharding.mask, self._group.rank, self._group.size)
        self.cache.expect_prompt(local.plan)
        holder, row = _last(local.plan)
        logits = self._logits_of(local, row if holder == self._group.rank else 0)
        return broadcast(self._group, logits, holder)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Adds tokens to the sequences and returns the logits ``[B, n, V]`` of what comes after each.

        tokens: int64 ``[B, n]``, the same on every rank.
        """
        if self._sequences not in (None, len(tokens)):
            raise ConfigError(
                f"decode got tokens of {len(tokens)} sequences, and this session has {self._sequences}; give as many, "
                "or open another session"
            )
        self._sequences = len(tokens)
        arrivals = self.cache.expect(*tokens.shape)
        positions = torch.tensor(arrivals.positions, dtype=torch.int64).expand(tokens.shape)
        logits: Tensor = self._model(tokens.to(self._device), positions.to(self._device), _NO_PLAN)
        return logits

    def _logits_of(self, local: LocalBatch, row: int) -> Tensor:
        """Returns the logits ``[B, V]`` of one row of this rank's tokens: those of a whole prompt would not fit."""
        vocabulary = self._model.vocabulary
        self._model.vocabulary = _OneRow(vocabulary, row)
        try:
            tokens, positions = local.tokens.to(self._device), local.positions.to(self._device)
            logits: Tensor = self._model(tokens, positions, local.plan.handle)
        finally:
            self._model.vocabulary = vocabulary
        return logits[:, 0].contiguous()


class _OneRow(Vocabulary):
    """Another vocabulary's logits of one row of the hidden states."""

    def __init__(self, vocabulary: Vocabulary, row: int) -> None:
        self._vocabulary = vocabulary
        self._row = row

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self._vocabulary.logits(hidden[:, self._row : self._row + 1], weight)


def _last(plan: SequencePlan) -> tuple[int, int]:
    """Returns rank and local row of the sequence's last token."""
    positions = [plan.positions(rank) for rank in range(plan.world)]
    holder = max(range(plan.world), key=lambda rank: cast("int", positions[rank][-1]) if len(positions[rank]) else -1)
    return holder, len(positions[holder]) - 1
