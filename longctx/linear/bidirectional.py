"""Computes linear attention whose queries see later tokens too: every document has one state, the sum over all of it.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (2025), without mask.

    M_d = sum of k_t v_t^T over document d         o_t = q_t M_d

    sum my chunks' parts of each document          gradients of M_d by my queries
    start summing over ranks those that cross      start summing over ranks those that cross
    O = documents inside one chunk                 gradients that need M_d alone
    O += Q M                                       gradients of my parts

A state that decays has no such sum, so transitions are refused. There is one all-reduce each way, of the documents
that several ranks hold; nothing is sent for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.attention.costs.estimate import Volume
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import SUM, start_all_reduce
from longctx.linear.autograd import autograd
from longctx.linear.chunks import Chunks, distinct_packings, grid_of
from longctx.linear.diagonal import by_token
from longctx.linear.registry import LinearSizes
from longctx.linear.segments import chain_of
from longctx.linear.states import LinearContext
from longctx.sequence import SequencePlan, view
from longctx.sequence.documents import Int64


@dataclass(frozen=True)
class Parts:
    """Which documents a rank's chunks hold parts of: at most that of the chunk's first token and that of its last.

    ``crossing``: slots of documents that several ranks hold, the same on all; then those of this rank alone, and
    one of no document. ``first``, ``last`` bool ``[B', N, C]``: tokens of such a document, its slot ``[B', N]``;
    ``inner`` bool ``[B', N, C, C]``: pairs of a document inside the chunk.
    """

    crossing: int
    slots: int
    first: Tensor
    first_slot: Tensor
    last: Tensor
    last_slot: Tensor
    inner: Tensor

    def to(self, device: torch.device) -> Parts:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Parts(self.crossing, self.slots, **moved)


def crossing_documents(plan: SequencePlan, row: int) -> Int64:
    """Returns the numbers of a row's documents that have tokens on several ranks."""
    bounds = plan.documents[row].cu_seqlens
    holders = sum(
        (np.diff(np.searchsorted(plan.positions(rank), bounds)) > 0).astype(np.int64) for rank in range(plan.world)
    )
    return np.flatnonzero(holders > 1)


def cut_parts(plan: SequencePlan, rank: int, chunk: int) -> Parts:
    """Returns which documents the chunks of one rank hold parts of, on the host."""
    chain = chain_of(plan)
    grid = grid_of([chain.segments[place] for place in chain.places_of(rank)], plan.shard, chunk)
    rows = [_row_parts(plan, row, grid.filled) for row in range(len(distinct_packings(plan.documents)))]
    crossing = max(len(crossing_documents(plan, row)) for row in range(len(plan.documents)))
    alone = max(count for _, count in rows)
    arrays = {name: np.stack([found[name] for found, _ in rows]) for name in rows[0][0]}
    for name in ("first_slot", "last_slot"):
        found = arrays[name]  # those of several ranks, then -2, -3, ... for those of this one, -1 for none
        arrays[name] = np.where(found == -1, crossing + alone, np.where(found < 0, crossing - 2 - found, found))
    return Parts(crossing, crossing + alone + 1, **{name: torch.from_numpy(value) for name, value in arrays.items()})


def _row_parts(plan: SequencePlan, row: int, position: Int64) -> tuple[dict[str, np.ndarray], int]:
    documents = plan.documents[row]
    start, stop = documents.bounds_of(position)
    number = np.searchsorted(documents.cu_seqlens, position, side="right") - 1
    real = position < documents.length
    outside = (start < position[:, :1]) | (stop > position[:, -1:] + 1)
    first = real & outside & (number == number[:, :1])
    last = real & outside & (number == number[:, -1:]) & ~first
    inner = real & ~outside
    slot = np.full(len(documents) + 1, -1, dtype=np.int64)
    crossing = crossing_documents(plan, row)
    slot[crossing] = np.arange(len(crossing))
    alone = np.setdiff1d(np.unique(number[first | last]), crossing)
    slot[alone] = -2 - np.arange(len(alone))
    found = {
        "first": first,
        "first_slot": np.where(first.any(1), slot[number[:, 0]], -1),
        "last": last,
        "last_slot": np.where(last.any(1), slot[number[:, -1]], -1),
        "inner": (start[..., :, None] == start[..., None, :]) & inner[..., :, None] & inner[..., None, :],
    }
    return found, len(alone)


@view
def parts_of(plan: SequencePlan, rank: int, chunk: int, device: torch.device) -> Parts:
    """Returns the parts of a rank's chunks on ``device``, moved once.

    A copy from ordinary memory makes the host wait.
    """
    return cut_parts(plan, rank, chunk).to(device)


def forward(tensors: Sequence[Tensor], chunks: Chunks, parts: Parts, context: LinearContext) -> tuple[Tensor, Tensor]:
    """Computes the output ``[B, T/SP, H/TP, V]`` and the sums of documents ``[B, slots, H/TP, K, V]``."""
    tensors, bad = _clean(tensors)
    q, k, v = _cut(tensors, chunks)
    sums = _sums(k, v, parts)
    crossing = start_all_reduce(context.group, sums[:, : parts.crossing].contiguous(), SUM)
    out = _inner(q, k, v, parts)
    sums[:, : parts.crossing] = crossing.wait()
    return chunks.join(out + _read(q, sums, parts)).masked_fill(bad, torch.nan), sums


def backward(
    dout: Tensor, tensors: Sequence[Tensor], sums: Tensor, chunks: Chunks, parts: Parts, context: LinearContext
) -> list[Tensor]:
    """Computes the gradients of q, k and v."""
    tensors, bad = _clean(tensors)
    [dout], bad_dout = _clean([dout])
    with autograd():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        q, k, v = _cut(leaves, chunks)
        whole = sums.detach().requires_grad_()
        read = _read(q, whole, parts)
    dout = chunks.cut(dout.to(sums.dtype))
    with autograd():
        (dsums,) = torch.autograd.grad(read, whole, dout, retain_graph=True)
    crossing = start_all_reduce(context.group, dsums[:, : parts.crossing].contiguous(), SUM)
    with autograd():
        out = read + _inner(q, k, v, parts)
        first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    dsums[:, : parts.crossing] = crossing.wait()
    with autograd():
        second = torch.autograd.grad(_sums(k, v, parts), leaves[1:], dsums)
    found = [first[0], first[1] + second[0], first[2] + second[1]]
    return [gradient.masked_fill(bad | bad_dout, torch.nan) for gradient in found]


def _clean(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Tensors without tokens that are no numbers, which are 0, and where those are, ``[B, T, H, 1]``.

    Sums go over all tokens of a chunk, with 0 for those of other documents; 0 times infinity is none.
    """
    sums = [tensor.sum(-1, keepdim=True, dtype=accumulation_dtype(tensor.dtype)) for tensor in tensors]
    bad = ~torch.stack([one.isfinite() for one in sums]).all(0)
    return [tensor.masked_fill(bad, 0) for tensor in tensors], bad


def _cut(tensors: Sequence[Tensor], chunks: Chunks) -> list[Tensor]:
    return [chunks.cut(tensor.to(accumulation_dtype(tensor.dtype))) for tensor in tensors]


def _sums(k: Tensor, v: Tensor, parts: Parts) -> Tensor:
    """Returns this rank's share of each document's state, ``[B, slots, H, K, V]``; the last slot is of no use."""
    sums = k.new_zeros(len(k), parts.slots, k.shape[2], k.shape[-1], v.shape[-1]).flatten(0, 1)
    for mask, slot in ((parts.first, parts.first_slot), (parts.last, parts.last_slot)):
        part = k.masked_fill(~by_token(mask), 0).mT @ v
        sums = sums.index_add(0, _flat(slot, len(k), parts), part.flatten(0, 1))
    return sums.unflatten(0, (len(k), parts.slots))


def _read(q: Tensor, sums: Tensor, parts: Parts) -> Tensor:
    out = q.new_zeros(())
    for mask, slot in ((parts.first, parts.first_slot), (parts.last, parts.last_slot)):
        state = sums.flatten(0, 1).index_select(0, _flat(slot, len(q), parts)).unflatten(0, q.shape[:2])
        out = out + q.masked_fill(~by_token(mask), 0) @ state
    return out


def _inner(q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Tensor:
    return (q @ k.mT).masked_fill(~parts.inner.unsqueeze(2), 0) @ v


def _flat(slot: Tensor, batch: int, parts: Parts) -> Tensor:
    """Returns slots ``[B', N]`` as places among those of all batch rows, ``[B N]``."""
    rows = torch.arange(batch, device=slot.device)[:, None]
    return (slot + rows * parts.slots).flatten()


def total_volume(plan: SequencePlan, sizes: LinearSizes) -> Volume:
    """Counts an all-reduce of the states of documents that cross ranks, in each direction."""
    crossing = max(len(crossing_documents(plan, row)) for row in range(len(plan.documents)))
    if plan.world == 1 or not crossing:
        return Volume(0, 0, 0, 0)
    sent = 2 * (plan.world - 1) * crossing * sizes.state // plan.world
    return Volume(sent, sent, 1, 1)
