"""Lets a group of ranks share the sequences of a ``transformers`` model: registers, adopts, cuts, and sums."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.attention import AttentionCase, StrategyAttention, StrategyOptions, get_strategy, require, settled
from longctx.attention.runtime.borders import process_group_of
from longctx.comm import group_of
from longctx.errors import ConfigError, DataError, NotAvailableError
from longctx.huggingface.reference.dtype import make_tables
from longctx.integrations.transformers.cut import CutBatch
from longctx.integrations.transformers.interface import NAME, attend, no_mask
from longctx.integrations.transformers.packing import Packed, PackedRows, packed_rows
from longctx.integrations.transformers.reduction import on_all_ranks, sum_gradients, summed
from longctx.integrations.transformers.refusals import BY_LENGTH, attention_layers, require_model, rope_types
from longctx.rules import whole
from longctx.sequence import IGNORE, Batch, Layout, Mask, cut, make_layout, make_plan

UNSET = StrategyOptions()


def register(
    group: Any = None,
    strategy: str = "ring",
    layout: str | Layout = "zigzag",
    *,
    kernel: str = "auto",
    options: StrategyOptions = UNSET,
) -> SharedSequence:
    """Registers ``attn_implementation="longctx"`` with ``transformers``, and returns the sequence group.

    ``group``: the process group whose ranks share each sequence, or a device mesh of one axis; None for this process
    alone. ``strategy``, ``layout``, ``options``: as everywhere in longctx.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        raise NotAvailableError(
            "transformers is not installed, or older than 4.57; pip install 'longctx[hf]'"
        ) from None
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, no_mask)
    return SharedSequence(group, strategy, layout, kernel, options)


class SharedSequence:
    """Runs models of ``transformers`` on the ranks of one sequence group; ``register`` makes it.

    In this order: ``adopt`` a model, ``shard`` each batch, ``loss`` of the logits, ``sum_gradients``. All ranks of the
    group call each at the same point, with the same model and the same whole batch.
    """

    def __init__(self, group: Any, strategy: str, layout: str | Layout, kernel: str, options: StrategyOptions) -> None:
        self._process_group = process_group_of(group)
        self._group = group_of(self._process_group)
        self._strategy = get_strategy(strategy)
        self._layout = make_layout(layout) if isinstance(layout, str) else layout
        self._kernel, self._options = kernel, options
        self._attention: dict[float | None, StrategyAttention] = {}
        self._cases: dict[AttentionCase, None] = {}  # of all models, one for each window, in order
        self._longest: int | None = None
        self.layers: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()

    @property
    def size(self) -> int:
        """Returns the number of ranks that share each sequence."""
        return self._group.size

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self._process_group

    def adopt(self, model: nn.Module, length: int | None = None) -> None:
        """Takes a model as it is to be run, before DDP or FSDP wraps it. Refuses what would not be exact.

        ``length``: tokens of the sequences, for types of RoPE whose table depends on it (dynamic, longrope): else each
        rank would choose one by its own tokens.
        """
        require_model(model)
        config: Any = model.config
        layers = attention_layers(model)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        cases = [
            AttentionCase(
                self.size, heads, kv_heads, self._layout.name, Mask(True, window), self._options, False, self._kernel
            )
            for window in dict.fromkeys(layers.values())
        ]
        for case in cases:
            require(self._strategy, case)
        self._cases.update(dict.fromkeys(cases))
        self._options = settled(self._strategy, cases[0])
        self._declare(model, length)
        if config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)  # type: ignore[operator]
        self.layers.update(layers)
        self.attention(None)  # process groups of a grid are made here, at one point of all ranks

    def _declare(self, model: Any, length: int | None) -> None:
        """Makes tables of RoPE that depend on a length for the declared one."""
        kinds = sorted(rope_types(model.config) & set(BY_LENGTH))
        if length is not None:
            length = whole("length of the sequences", length, 1)
        if not kinds:
            return
        if length is None:
            raise ConfigError(
                f"rope_type {kinds[0]} chooses its table by the longest position that a rank happens to have; declare "
                "the length of the sequences: sequence.adopt(model, length=...)"
            )
        self._longest = length
        device = next(model.parameters()).device
        make_tables(model, length)
        for module in model.modules():
            if hasattr(module, "rope_type"):
                module.to(device)

    def attention(self, scale: float | None) -> StrategyAttention:
        """Returns the strategy of this group with a layer's softmax scale."""
        if scale not in self._attention:
            self._attention[scale] = StrategyAttention(
                self._strategy.name, self._process_group, self._kernel, scale, self._options
            )
        return self._attention[scale]

    def shard(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        documents: Packed | None = None,
    ) -> CutBatch:
        """Cuts a whole batch ``[B, S]``, the same on every rank of the group, and returns this rank's part.

        ``labels``: those of ``transformers``, shifted here; by default ``input_ids``. The first token of a document is
        never a target. ``position_ids``: a document begins where they do not go on; by default from each document's
        start. ``documents``: lengths, in place of that. ``attention_mask``: zeros for padding at either end.
        """
        if not self.layers:
            raise ConfigError("no model is adopted yet, whose windows the batch is planned for; sequence.adopt(model)")

        def pack() -> PackedRows:
            packed = packed_rows(input_ids, labels, position_ids, attention_mask, documents)
            self._require(packed)
            return packed

        packed = on_all_ranks(self._process_group, input_ids, pack)
        device, shifted = input_ids.device, torch.from_numpy(packed.labels)
        plan = make_plan(packed.documents, Mask(), self._layout, input_ids.shape[1], self.size)
        local = cut(Batch(input_ids, shifted.to(device), packed.documents), plan, self._group.rank)
        positions = torch.zeros_like(local.positions)
        where = torch.from_numpy(plan.positions(self._group.rank))
        positions[:, : len(where)] = torch.from_numpy(packed.positions)[:, where].to(device)
        windows = dict.fromkeys(self.layers.values())
        plans = {window: plan if window is None else plan.windowed(window) for window in windows}
        count = int((packed.labels != IGNORE).sum())
        return CutBatch(local.tokens, local.labels, positions, count, plan, plans, self)

    def _require(self, packed: PackedRows) -> None:
        """Refuses a batch beyond the declared length, or packed for a strategy that takes whole sequences."""
        highest = int(packed.positions.max())
        if self._longest is not None and highest >= self._longest:
            raise DataError(
                f"position {highest} is beyond the declared length {self._longest}; adopt(model, length=...)"
            )
        if any(len(row) > 1 for row in packed.documents):
            for case in self._cases:
                require(self._strategy, replace(case, documents=True))

    def loss(
        self,
        logits: Tensor,
        batch: CutBatch,
        averaged_over: dist.ProcessGroup | None = None,
        count: Tensor | int | None = None,
    ) -> Tensor:
        """Returns the mean loss of all ranks' labels; its gradient is this rank's share.

        By default shares are to be summed over the sequence group, by ``sum_gradients``. ``averaged_over``: the group
        over which DDP or FSDP averages gradients, data parallel ranks and the sequence group together. ``count``: what
        to divide by, in place of this batch's labels: those of all microbatches of a step.
        """
        if logits.shape[:-1] != batch.labels.shape:
            raise DataError(
                f"logits {tuple(logits.shape)} must be [B, T, V] of the cut batch, labels {tuple(batch.labels.shape)}; "
                "leave out logits_to_keep"
            )
        wide = logits if logits.dtype is torch.float64 else logits.float()
        share = F.cross_entropy(wide.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        if averaged_over is None:
            group, factor = self._process_group, 1
        else:
            group, factor = averaged_over, dist.get_world_size(averaged_over)
        if count is None:
            if averaged_over is not None:
                count = summed((batch.labels != IGNORE).sum(), group)
            elif batch.count == 0:
                raise DataError(
                    "no token of the batch predicts anything: all labels are -100, or documents have one token"
                )
            else:
                count = batch.count
        divisor = torch.as_tensor(count, dtype=share.dtype, device=share.device).clamp(min=1)
        own = share * (factor / divisor)
        return summed(share.detach().clone(), group) / divisor + (own - own.detach())

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums the gradients of a model over the sequence group, once per step, before clipping and the update.

        Not for models in DDP or FSDP, which reduce gradients themselves: see ``loss``.
        """
        sum_gradients(model, self._process_group)
