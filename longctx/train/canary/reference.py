"""Computes what the canary expects: the step on one device, in fp64, without any of the run's parallel code.

Attention follows its definition, and linear layers go token by token. It shares the decoder's code with the run and
nothing else: no plan, layout, tile, kernel, chunked loss or recompute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention import dense_attention
from longctx.attention.core import Started
from longctx.config import Config
from longctx.linear import Inputs, Mixer
from longctx.model import Decoder, LinearBlock, initialize
from longctx.parallel.core import mask_of
from longctx.parallel.data import master_dtype
from longctx.sequence import IGNORE, NO_PLAN, Batch, Documents, Mask
from longctx.train.canary.sample import seed_of


@dataclass(frozen=True)
class StepTensors:
    """What one step computed, in fp64: ``outputs`` ``[N, S, V]`` of all sequences, mean loss, gradients."""

    outputs: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


class DenseAttention:
    """Computes the core attention of one whole sequence by its definition; it needs no plan."""

    def __init__(self, documents: Documents, mask: Mask) -> None:
        self._documents = documents
        self._mask = mask

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        return Started(dense_attention(q, k, v, [self._documents], self._mask))

    def finish(self, started: Started) -> Tensor:
        return started.out


def dense_model(config: Config, device: torch.device) -> Decoder:
    """Returns a decoder with the run's initial weights, rounded as the run has them and then taken to fp64."""
    model = Decoder(config.model).to(master_dtype(config.train.dtype))
    initialize(model, seed_of(config))
    return model.to(device).double()


def dense_step(model: Decoder, config: Config, batches: Sequence[Sequence[Batch]], device: torch.device) -> StepTensors:
    """Computes one step on the run's sequences and leaves the gradients in ``model`` too.

    ``batches`` are as ``make_batches`` gives them. Equal sequences are computed once and counted as often as they
    occur. Outputs come in the order in which the run has them: by micro-batch, then by group.
    """
    order = [row for micro in zip(*batches, strict=True) for batch in micro for row in _rows(batch)]
    count = sum(row.valid_tokens for row in order)
    names = [row.tokens.numpy().tobytes() for row in order]
    outputs: dict[bytes, Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for name, row in dict(zip(names, order, strict=True)).items():
        logits = _logits(model, row, mask_of(config), device)
        total = F.cross_entropy(logits, row.labels[0].to(device), ignore_index=IGNORE, reduction="sum")
        share = total * names.count(name) / count
        share.backward()
        loss += share.detach()
        outputs[name] = logits.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return StepTensors(torch.stack([outputs[name] for name in names]), loss, gradients)


def _token_by_token(mixer: Mixer, documents: Documents, inputs: Inputs, plan: Tensor) -> Tensor:
    return mixer.recurrence(inputs, [documents])


def _rows(batch: Batch) -> list[Batch]:
    return [
        Batch(batch.tokens[row : row + 1], batch.labels[row : row + 1], (documents,))
        for row, documents in enumerate(batch.documents)
    ]


def _logits(model: Decoder, row: Batch, mask: Mask, device: torch.device) -> Tensor:
    """Returns logits ``[S, V]`` of one whole sequence."""
    (documents,) = row.documents
    for block in model.layers:
        window = model.config.window if block.kind == "W" else mask.window
        block.attention = DenseAttention(documents, replace(mask, window=window))
        if isinstance(block, LinearBlock):
            block.mix = partial(_token_by_token, block.mixer, documents)  # type: ignore[method-assign]
    positions = torch.cat([torch.arange(length) for length in documents.lengths.tolist()])[None]
    no_plan = torch.tensor(NO_PLAN)
    logits: Tensor = model(row.tokens.to(device), positions.to(device), no_plan)
    return logits[0]
