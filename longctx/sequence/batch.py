"""Sharding of batches: a global batch goes in, what one rank of the sequence group holds comes out.

``shard`` is the only scatter in longctx. Labels are shifted before the cut, so no rank needs its neighbour's token.
Positions and documents travel with the tokens, in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.errors import ConfigError, DataError
from longctx.rules import whole
from longctx.sequence.documents import Documents
from longctx.sequence.layout import Layout
from longctx.sequence.mask import Mask
from longctx.sequence.plan import SequencePlan, make_plan

IDS = (torch.int64, torch.int32)  # dtypes of tokens and labels
IGNORE = -100  # label of a token that predicts nothing: a document's last one, and padding


@dataclass(frozen=True)
class Batch:
    """Holds whole sequences, before any cut.

    ``tokens``, ``labels``: int64 ``[B, S]``; ``labels[b, i]`` is the token after ``tokens[b, i]`` in the same
    document, or ``IGNORE``. ``documents``: packing of each row; tokens past its last document are padding.
    """

    tokens: Tensor
    labels: Tensor
    documents: tuple[Documents, ...]

    def __post_init__(self) -> None:
        for name in ("tokens", "labels"):
            ids = getattr(self, name)
            if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in IDS or type(ids) is not Tensor:
                given = f"{ids.dtype} {tuple(ids.shape)} " if isinstance(ids, Tensor) else ""
                raise DataError(
                    f"{name} of a batch are a {given}{type(ids).__name__}; they must be a torch.Tensor [B, S] of int64"
                )
        if self.tokens.shape != self.labels.shape or self.tokens.device != self.labels.device:
            raise DataError(
                f"tokens {tuple(self.tokens.shape)} on {self.tokens.device} and labels {tuple(self.labels.shape)} on "
                f"{self.labels.device} must be alike, [B, S] on one device"
            )
        if isinstance(self.documents, Documents) or len(self.documents) != len(self.tokens):
            given = "one" if isinstance(self.documents, Documents) else str(len(self.documents))
            raise DataError(
                f"documents must be a tuple of one Documents for each of the {len(self.tokens)} rows, not {given}"
            )

    @property
    def valid_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class LocalBatch:
    """Holds one rank's part of a batch; ``T`` is the physical shard length, constant for the run.

    ``tokens``, ``labels``, ``positions``: int64 ``[B, T]``. ``positions`` count from each document's start
    (RoPE reads them). Rows past the rank's valid tokens hold token 0, label ``IGNORE``, position 0.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    plan: SequencePlan

    @property
    def valid_tokens(self) -> int:
        """Returns how many tokens of this rank predict something; their sum over ranks divides the loss."""
        return int((self.labels != IGNORE).sum())


def shard(batch: Batch, layout: Layout, mask: Mask, rank: int, world: int, multiple: int = 1) -> LocalBatch:
    """Cuts a batch for ``rank`` of a sequence group of ``world`` ranks.

    ``multiple``: the shard length is a multiple of it (the tensor-parallel degree).
    """
    world = whole("world", world, 1)
    rank = whole(f"rank of a sequence group of {world}", rank, 0, world - 1)
    return cut(batch, make_plan(batch.documents, mask, layout, batch.tokens.shape[1], world, multiple), rank)


def cut(batch: Batch, plan: SequencePlan, rank: int) -> LocalBatch:
    """Returns what ``rank`` holds of a batch that has been planned."""
    if (plan.documents, plan.length) != (tuple(batch.documents), batch.tokens.shape[1]):
        raise DataError(
            f"a batch of {len(batch.documents)} rows of {batch.tokens.shape[1]} tokens is cut by the plan of other "
            f"documents, {len(plan.documents)} rows of {plan.length} tokens; plan this batch by make_plan"
        )
    where = plan.positions(rank)
    positions = np.zeros((len(batch.documents), plan.shard), dtype=np.int64)
    for row, documents in enumerate(batch.documents):
        positions[row, : len(where)] = where - documents.bounds_of(where)[0]
    index = torch.from_numpy(where)
    tokens = batch.tokens.new_zeros(len(batch.tokens), plan.shard)
    labels = batch.labels.new_full(tokens.shape, IGNORE)
    tokens[:, : len(where)] = batch.tokens[:, index]
    labels[:, : len(where)] = batch.labels[:, index]
    return LocalBatch(tokens, labels, torch.from_numpy(positions).to(tokens.device), plan)


def unshard(shards: Sequence[Tensor], plan: SequencePlan) -> Tensor:
    """Undoes ``shard``, for evaluation and tests: every rank's ``[B, T, ...]`` to ``[B, S, ...]`` in natural order."""
    if len(shards) != plan.world or not all(isinstance(local, Tensor) for local in shards):
        raise ConfigError(f"a plan of {plan.world} ranks puts a tensor of each of them together, not {len(shards)}")
    first = shards[0]
    for rank, local in enumerate(shards):
        alike = (local.shape, local.dtype, local.device) == (first.shape, first.dtype, first.device)
        if not alike or local.ndim < 2 or local.shape[1] != plan.shard:
            raise ConfigError(
                f"tensor {tuple(local.shape)} of rank {rank} must be [B, {plan.shard}, ...], of {first.dtype} on "
                f"{first.device} as that of rank 0, {tuple(first.shape)}"
            )
    whole = first.new_zeros(first.shape[0], plan.length, *first.shape[2:])
    for rank, local in enumerate(shards):
        where = torch.from_numpy(plan.positions(rank))
        whole[:, where] = local[:, : len(where)]
    return whole
