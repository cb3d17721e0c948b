"""Computes embedding, logits and loss where each rank of an axis holds rows ``[V/TP, dim]`` of the vocabulary."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from longctx.model import Vocabulary, cross_entropy_sum
from longctx.model.loss import loss_dtype
from longctx.sequence import IGNORE


def sharded_lookup(embedding: nn.Module, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
    """Looks up tokens int64 ``[B, T/SP]`` and returns their rows ``[B, T/SP/TP, dim]``.

    torch's row-wise embedding makes a gradient of the whole table on every rank; this one of its own rows.
    """
    weight = cast("DTensor", embedding.weight).to_local()
    own, elsewhere = local_rows(tokens, mesh.get_local_rank(), len(weight))
    rows = F.embedding(own, weight).masked_fill(elsewhere[..., None], 0.0)
    # A tensor of its own: FSDP2 hooks into what the embedding returns, and a view could lose the hook.
    return DTensor.from_local(rows, mesh, [Partial()]).redistribute(mesh, [Shard(1)]).to_local().clone()


def local_rows(ids: Tensor, rank: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns where ids lie among the ``rows`` of ``rank``, and which lie elsewhere.

    Ids that lie elsewhere get any row.
    """
    own = ids - rank * rows
    elsewhere = (own < 0) | (own >= rows)
    return own.masked_fill(elsewhere, 0), elsewhere


class ShardedVocabulary(Vocabulary):
    """Computes logits or loss from a head's weight that is split over an axis by rows.

    hidden: a DTensor ``[B, T/SP, dim]``, whole on every rank; weight: one ``[V, dim]``, split by rows.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._chunk_loss = partial(sharded_chunk_loss, mesh.get_group(), mesh.get_local_rank())

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return cast("DTensor", F.linear(hidden, weight)).full_tensor()

    def loss_sum(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        """Returns the summed loss, the same on every rank of the axis."""
        # Each rank's rows bring a part of the hidden states' gradient.
        local = cast("DTensor", hidden).to_local(grad_placements=[Partial()]).flatten(0, 1)
        return cross_entropy_sum(local, cast("DTensor", weight).to_local(), labels.flatten(), chunk, self._chunk_loss)


def sharded_chunk_loss(
    group: dist.ProcessGroup, rank: int, hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the whole loss of a chunk and the gradient of this rank's logits ``[n, V/TP]``; weight: ``[V/TP, dim]``.

    It takes two small reductions per chunk, of ``[n]`` and ``[2, n]``.
    """
    logits = (hidden @ weight.T).to(loss_dtype(hidden))
    ignored = labels == IGNORE
    target, elsewhere = local_rows(labels, rank, len(weight))
    largest = logits.amax(dim=1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    logits.sub_(largest[:, None])
    at_target = logits.gather(1, target[:, None])[:, 0].masked_fill(elsewhere, 0.0)
    dlogits = logits.exp_()
    sums = torch.stack([dlogits.sum(dim=1), at_target])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    total, at_target = sums
    loss = (total.log() - at_target).masked_fill(ignored, 0.0).sum()
    dlogits.div_(total[:, None])
    # A label that lies elsewhere points at some row here and adds zero to it.
    minus_one = elsewhere.to(dlogits.dtype).sub_(1.0)
    dlogits.scatter_add_(1, target[:, None], minus_one[:, None])
    return loss, dlogits.masked_fill_(ignored[:, None], 0.0)
