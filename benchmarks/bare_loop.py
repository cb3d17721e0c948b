"""Runs the shortest loop that computes what the trainer computes: the floor of ``python -m benchmarks trainer``.

One process, plain parameters, PyTorch's own attention. No mesh, no sharding, no operators of ours, no metrics. Batches
are ready before the clock starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from longctx.attention.core import Started
from longctx.model import Decoder
from longctx.sequence import Batch


class PlainAttention:
    """Runs ``scaled_dot_product_attention`` on one document after another, for a mask would cost the whole square.

    In the place of a plan it takes the documents' bounds, int64 ``[N, 3]``: row, start, stop, in order.
    """

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """Computes all of it; nothing is left for ``finish`` to wait for."""
        outs = []
        for row, start, stop in plan.tolist():
            one, keys, values = (tensor[row : row + 1, start:stop].transpose(1, 2) for tensor in (q, k, v))
            out = F.scaled_dot_product_attention(one, keys, values, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(1, 2)[0])
        return Started(torch.cat(outs).view_as(q))

    def finish(self, started: Started) -> Tensor:
        """Returns the output ``[B, T, H, D]`` that ``start`` computed."""
        return started.out


@dataclass(frozen=True)
class BareBatch:
    """Holds a batch in the form that the bare loop reads; ``bounds``: see ``PlainAttention``."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    bounds: Tensor
    valid: int

    @classmethod
    def of(cls, batch: Batch) -> BareBatch:
        """Converts ``batch``, which is packed without padding."""
        bounds, positions = [], []
        for row, documents in enumerate(batch.documents):
            cuts = documents.cu_seqlens.tolist()
            pairs = list(itertools.pairwise(cuts))
            bounds += [(row, start, stop) for start, stop in pairs]
            positions.append(torch.cat([torch.arange(stop - start) for start, stop in pairs]))
        return cls(batch.tokens, batch.labels, torch.stack(positions), torch.tensor(bounds), batch.valid_tokens)


class BareLoop:
    """Trains a decoder without any of the trainer's machinery.

    ``model`` has ``PlainAttention``; ``optimizer`` holds its parameters.
    """

    def __init__(self, model: Decoder, optimizer: Optimizer, grad_clip: float | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._grad_clip = grad_clip

    def step(self, batches: Sequence[BareBatch], lr: float) -> float:
        """Runs forward, backward, clipping and update; returns the mean loss of a valid token."""
        count = sum(batch.valid for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            loss = self._model(batch.tokens, batch.positions, batch.bounds, batch.labels)
            (loss / count).backward()
            total += loss.detach()
        if self._grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._grad_clip, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total) / count
