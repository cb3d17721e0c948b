"""Runs a decoder that remembers the sequence so far, in a cache sharded over a group of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longctx.attention import CoreAttention, StrategyAttention
from longctx.attention.decoding.cache import SequenceCache
from longctx.attention.decoding.tree_decoding import CachedAttention
from longctx.comm import broadcast, group_of
from longctx.config import ModelConfig
from longctx.errors import ConfigError
from longctx.evaluate.linear_memory import RememberingCore
from longctx.evaluate.stages import StagedModel
from longctx.linear import LinearAttention
from longctx.model import Decoder, Vocabulary
from longctx.model.linear_block import LINEAR, mixer_of
from longctx.sequence import IGNORE, NO_PLAN, Batch, Documents, Layout, LocalBatch, Mask, SequencePlan, Zigzag, shard

_NO_PLAN = torch.tensor(NO_PLAN, dtype=torch.int64)  # new tokens are not cut


@dataclass(frozen=True)
class SequenceSharding:
    """Which ranks share the sequence, and how a prompt is sharded and computed.

    ``group``: None for this process alone. ``prefill``: what computes a prompt's attention; None for the ring.
    ``linear``: the same of linear layers; None for LASP-2. ``kernel``: of the new tokens' attention. ``multiple``: what
    a rank's tokens are a multiple of, for tensor parallelism cuts them again. All ranks of the group have the same
    tokens and do the same steps. Where parameters are sharded over more ranks than the group, those must do as many
    steps as well.
    """

    group: dist.ProcessGroup | None = None
    prefill: CoreAttention | None = None
    layout: Layout = field(default_factory=Zigzag)
    mask: Mask = field(default_factory=Mask)
    kernel: str = "auto"
    linear: LinearAttention | None = None
    multiple: int = 1


class DecodingSession:
    """Lends the model's layers an attention that keeps keys and values; on exit they get back their own.

    Layers with a window keep no more than it, linear layers a state. A prompt goes through ``prefill``, at most once
    and first; whatever follows through ``decode``, a few tokens at a time. Both give the same logits on every rank.
    """

    def __init__(self, model: Decoder | StagedModel, sharding: SequenceSharding) -> None:
        if not sharding.mask.causal:
            raise ConfigError("generation needs a causal mask: tokens cannot see those that do not exist yet")
        if isinstance(model, Decoder) and not (model.part.first and model.part.last):
            raise ConfigError("generation needs all stages of the model; a part of a pipeline comes in a StagedModel")
        require_remembered(model.config)
        self._model = model
        self._sharding = sharding
        self._group = group_of(sharding.group)
        self._parts = [model] if isinstance(model, Decoder) else model.decoders
        self._device = next(self._parts[0].parameters()).device
        self._sequences: int | None = None  # of the first tokens, and so of all that follow
        self._own = [(block, block.attention) for part in self._parts for block in part.layers]
        self._linear: list[RememberingCore] = []
        self.caches = self._lend()

    def _lend(self) -> dict[str, SequenceCache]:
        """Lends each layer what remembers; returns the cache of each kind of softmax layers."""
        sharding, window = self._sharding, self._model.config.window
        kinds = [block.kind for block, _ in self._own]
        caches = {}
        for kind in {"S": 0, **dict.fromkeys(kinds)}:
            if kind != LINEAR:
                mask = sharding.mask.within(window) if kind == "W" and window is not None else sharding.mask
                caches[kind] = SequenceCache(self._group, mask, kinds.count(kind))
        whole = sharding.prefill or StrategyAttention("ring", sharding.group, sharding.kernel)
        places = dict.fromkeys(caches, 0)
        for block, _ in self._own:
            if block.kind == LINEAR:
                core = RememberingCore(sharding.linear or LinearAttention("lasp2", sharding.group), self._group)
                self._linear.append(core)
                block.attention = core
            else:
                block.attention = CachedAttention(whole, caches[block.kind], places[block.kind], sharding.kernel)
                places[block.kind] += 1
        return caches

    @property
    def cache(self) -> SequenceCache:
        """Returns the cache of layers that see the whole sequence, which counts its tokens."""
        return self.caches["S"]

    def __enter__(self) -> DecodingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for block, own in self._own:
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
        sharding, ranks = self._sharding, self._group
        whole = Batch(tokens, torch.full_like(tokens, IGNORE), (Documents.single(length),) * batch)
        local = shard(whole, sharding.layout, sharding.mask, ranks.rank, ranks.size, sharding.multiple)
        for kind, cache in self.caches.items():
            window = self._model.config.window
            cache.expect_prompt(local.plan.windowed(window) if kind == "W" and window is not None else local.plan)
        for core in self._linear:
            core.begin(None)
        holder, row = _last(local.plan)
        logits = self._logits_of(local, row if holder == ranks.rank else 0)
        return broadcast(ranks, logits, holder)

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
        self._sequences, new = len(tokens), tokens.shape[1]
        padding = -new % self._sharding.multiple
        for cache in self.caches.values():
            arrivals = cache.expect(len(tokens), new, padding, self._device)
        for core in self._linear:
            core.begin(new)
        positions = torch.tensor(arrivals.positions, dtype=torch.int64).expand(tokens.shape)
        padded = [F.pad(one, (0, padding)).to(self._device) for one in (tokens, positions)]
        logits: Tensor = self._model(padded[0], padded[1], _NO_PLAN)
        return logits[:, :new]

    def agree(self, tokens: Tensor) -> Tensor:
        """Returns the tokens ``[B]`` that the first rank of all chose, on every rank."""
        whole = group_of(dist.group.WORLD if dist.is_initialized() and self._sharding.group is not None else None)
        return broadcast(whole, tokens, 0)

    def _logits_of(self, local: LocalBatch, row: int) -> Tensor:
        """Returns the logits ``[B, V]`` of one row of this rank's tokens: those of a whole prompt would not fit."""
        lent = [(part, part.vocabulary) for part in self._parts]
        for part, vocabulary in lent:
            part.vocabulary = _OneRow(vocabulary, row)
        try:
            tokens, positions = local.tokens.to(self._device), local.positions.to(self._device)
            if isinstance(self._model, Decoder):
                logits: Tensor = self._model(tokens, positions, local.plan.handle)
            else:
                logits = self._model(tokens, positions, local.plan.handle, rows=1)
        finally:
            for part, vocabulary in lent:
                part.vocabulary = vocabulary
        return logits[:, 0].contiguous()


def require_remembered(model: ModelConfig) -> None:
    """Refuses models whose linear layers have no state that a further token could go on from."""
    if "L" in model.pattern and not mixer_of(model).has_states:
        raise ConfigError(
            f"generation keeps the states of linear layers, and model.mixer={model.mixer} has none: it fetches tokens "
            "itself; it runs on softmax layers (model.pattern=S) and on mixers with a state, such as retnet"
        )


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
