"""Ring self-attention: two rings and whole rows of scores, without an online softmax.

Li, Xue, Baranwal, Li, You, "Sequence Parallelism: Long Sequence Training from System Perspective" (2021; ACL 2023),
section 3.2.

    forward:                                        backward:
    for block k in ring: scores of its columns      for block k in ring: scores of its columns
    weights = softmax(scores)                       weights = exp(scores - lse)
    for block v in ring: out += weights * v         for block v in ring: d_weights of its columns; send dv on
                                                    d_scores = weights * (d_weights - rowsum(weights * d_weights))
                                                    for block k in ring: dq += d_scores * k; send dk on

It is here as the method that Ring Attention replaced: every rank holds scores ``[B, H/TP, T/SP, S]``, in the backward
pass twice, and computes hidden cells too. The paper keeps the weights for its backward pass; an operator that saves
(out, lse) rebuilds them by one more ring of keys. In turn dk and dv follow their blocks and are summed on the way,
P - 1 shards each. The paper all-reduces them whole, 2 (P - 1) each: 5 (P - 1) shards in place of its 6 (P - 1).
Scores are plain matrix products in the accumulation dtype; no local kernel is used, whatever attention.kernel says.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy, require_fit
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Strategy
from longctx.comm import Group, Pending, exchange
from longctx.errors import ConfigError
from longctx.sequence import SequencePlan, view

# Letters of the einsums: b batch, q queries, k keys, h key/value heads, g query heads of each, d channels.


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of the local queries; q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``."""
    dtype, mine = accumulation_dtype(q.dtype), slice(0, len(context.plan.positions(context.group.rank)))
    [v] = without_padding(context, v)
    scores = score_rows(q, k, context)
    row_lse = torch.logsumexp(scores, dim=-1)
    weights = _softmax(scores, row_lse)
    rows = _grouped(torch.zeros_like(q[:, mine], dtype=dtype), k)
    for _, columns, values in ring(v, context):
        rows += torch.einsum("bhgqk,bkhd->bqhgd", weights[..., columns], values.to(dtype))
    out = torch.zeros_like(q, dtype=dtype)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    out[:, mine] = rows.flatten(2, 3)
    lse[:, mine] = row_lse.permute(0, 3, 1, 2).flatten(2, 3)
    return out, lse


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v in the accumulation dtype."""
    lse = saved[-1]
    q, k, v, dout = without_padding(context, *saved[:3], dout)
    dtype, mine = accumulation_dtype(q.dtype), slice(0, len(context.plan.positions(context.group.rank)))
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    queries, douts = _grouped(q[:, mine].to(dtype), k), _grouped(dout[:, mine].to(dtype), k)
    weights = _softmax(score_rows(q, k, context), _grouped(lse[:, mine], k).permute(0, 2, 3, 1))

    d_weights, dv_return = torch.empty_like(weights), KeyGradientReturn(dv[:, mine], context)
    for hop, columns, values in ring(v, context):
        d_weights[..., columns] = torch.einsum("bqhgd,bkhd->bhgqk", douts, values.to(dtype))
        dv_return.add(hop, torch.einsum("bhgqk,bqhgd->bkhd", weights[..., columns], douts))

    row_sums = (weights * d_weights).sum(dim=-1, keepdim=True)
    d_scores = weights.mul_(d_weights.sub_(row_sums)).mul_(context.scale)

    d_queries, dk_return = torch.zeros_like(queries), KeyGradientReturn(dk[:, mine], context)
    for hop, columns, keys in ring(k, context):
        d_queries += torch.einsum("bhgqk,bkhd->bqhgd", d_scores[..., columns], keys.to(dtype))
        dk_return.add(hop, torch.einsum("bhgqk,bqhgd->bkhd", d_scores[..., columns], queries))
    dv_return.finish()
    dk_return.finish()
    dq[:, mine] = d_queries.flatten(2, 3)
    return dq, dk, dv


def without_padding(context: AttentionContext, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns local tensors ``[B, T/SP, ...]`` with 0 in place of padding, whose weights are 0 but not its numbers."""
    padding = _padding(context.plan, context.group.rank)
    if not padding.any():
        return tensors
    mask = padding.to(tensors[0].device, non_blocking=True)
    return tuple(tensor.masked_fill(mask, 0) for tensor in tensors)


@view
def _padding(plan: SequencePlan, rank: int) -> Tensor:
    """Which local tokens are of no document, bool ``[B, T/SP, 1, 1]``."""
    found = torch.ones(len(plan.documents), plan.shard, 1, 1, dtype=torch.bool)
    for row, documents in enumerate(plan.documents):
        found[row, : int((plan.positions(rank) < documents.length).sum())] = False
    return found


def score_rows(q: Tensor, k: Tensor, context: AttentionContext) -> Tensor:
    """Returns the scaled scores of the local queries with all keys, -inf where masked.

    ``[B, Hkv/TP, H/Hkv, T/SP, S]``. Columns are ordered by owner, as rank 0 holds them, then rank 1, and so on.
    """
    plan, me, dtype = context.plan, context.group.rank, accumulation_dtype(q.dtype)
    queries = _grouped(q[:, : len(plan.positions(me))].to(dtype), k)
    batch, count, kv_heads, per_key, _ = queries.shape
    scores = queries.new_empty(batch, kv_heads, per_key, count, plan.length)
    for _, columns, keys in ring(k, context):
        scores[..., columns] = torch.einsum("bqhgd,bkhd->bhgqk", queries, keys.to(dtype)).mul_(context.scale)
    return scores.masked_fill_(hidden(plan, me).to(scores.device, non_blocking=True), -torch.inf)


def hidden(plan: SequencePlan, rank: int) -> Tensor:
    """Returns which keys, ordered by owner, the local queries do not see, bool ``[B, 1, 1, T/SP, S]``."""
    keys = np.concatenate([plan.positions(owner) for owner in range(plan.world)])
    rows = []
    for documents in plan.documents:
        start, stop = plan.mask.key_range(plan.positions(rank), documents)
        rows.append((keys < start[:, None]) | (keys >= stop[:, None]))
    return torch.from_numpy(np.stack(rows))[:, None, None]


def ring(local: Tensor, context: AttentionContext) -> Iterator[tuple[int, slice, Tensor]]:
    """Yields (hop, columns, block) of every rank's keys or values, while the next block is in flight.

    This rank's block comes first, then that of the rank before it, and so on. ``local``: ``[B, T/SP, Hkv/TP, D]``.
    """
    counts, me, world = shard_lengths(context.plan), context.group.rank, context.group.size
    block = local[:, : counts[me]].contiguous()
    for hop in range(world):
        owner, following = (me - hop) % world, (me - hop - 1) % world
        passing = _send_recv(block, counts[following], context) if hop < world - 1 else None
        first = sum(counts[:owner])
        yield hop, slice(first, first + counts[owner]), block
        if passing:
            [block] = passing.wait()


class KeyGradientReturn:
    """Sends gradients on, one hop behind their block, and sums them on the way.

    The last holder is the owner's neighbour.

    ``grad``: the valid rows of this rank's own gradient, ``[B, T/SP, Hkv/TP, D]``, which it adds to.
    """

    def __init__(self, grad: Tensor, context: AttentionContext) -> None:
        self._grad = grad
        self._context = context
        self._partial_sums: Pending | None = None

    def add(self, hop: int, share: Tensor) -> None:
        """Adds this rank's share of the gradient of the block that it holds at ``hop``."""
        if hop == 0:
            self._grad += share
            return
        if self._partial_sums:
            share += self._partial_sums.wait()[0]
        following = (self._context.group.rank - hop - 1) % self._context.group.size
        self._partial_sums = _send_recv(share.contiguous(), shard_lengths(self._context.plan)[following], self._context)

    def finish(self) -> None:
        """Adds what the other ranks have summed for this rank's own block."""
        if self._partial_sums:
            self._grad += self._partial_sums.wait()[0]


def _send_recv(block: Tensor, coming: int, context: AttentionContext) -> Pending:
    """Sends a block to the next rank; expects one of ``coming`` tokens from the rank before."""
    me, world = context.group.rank, context.group.size
    buffer = block.new_empty(block.shape[0], coming, *block.shape[2:])
    return exchange(context.group, [((me + 1) % world, block)], [((me - 1) % world, buffer)])


def shard_lengths(plan: SequencePlan) -> list[int]:
    """Returns the number of valid tokens of every rank."""
    return [len(plan.positions(rank)) for rank in range(plan.world)]


def _grouped(rows: Tensor, k: Tensor) -> Tensor:
    """``[B, T/SP, H/TP, ...]`` with query heads by key/value head, ``[B, T/SP, Hkv/TP, H/Hkv, ...]``."""
    return rows.unflatten(2, (k.shape[2], -1))


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """Weights in place of the scores; 0 where a query (of padding) sees nothing and its lse is -inf."""
    return scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp_()


def _refuses(case: AttentionCase) -> str | None:
    if case.mask.window is not None:
        return (
            f"attention.window={case.mask.window}: its rows of scores are whole; use attention.window=null, "
            "or attention=ring"
        )
    if case.documents:
        return (
            "attention.document_mask=true (or several documents): its rows of scores are whole; use "
            "attention.document_mask=false, or attention=ring"
        )
    if case.kernel != "auto":
        return f"attention.kernel={case.kernel}: it asks no kernel; use attention.kernel=auto"
    return None


def require_whole_rows(q: Tensor, plan: SequencePlan, group: Group) -> None:
    """Refuses queries that a plan is not for, and plans with windows or several documents in a row."""
    require_fit(q, plan, group)
    packed = any(len(row) > 1 for row in plan.documents)
    reason = _refuses(AttentionCase(plan.world, 1, 1, plan.layout.name, plan.mask, documents=packed))
    if reason:
        raise ConfigError(f"attention.strategy=rsa refuses: {reason}")


def work(plan: SequencePlan, rank: int, inner: int) -> float:
    """Returns the cells of whole rows of scores, masked ones too."""
    return len(plan.documents) * len(plan.positions(rank)) * plan.length


RSA = Strategy(
    "rsa",
    define_strategy("rsa", forward, backward, fits=require_whole_rows),
    layout="contiguous",
    refuses=_refuses,
    work=work,
    costs="longctx.attention.costs.rsa:COSTS",
)
