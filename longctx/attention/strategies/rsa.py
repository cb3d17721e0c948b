"""Ring self-attention: two rings and whole rows of scores, without an online softmax.

Li, Xue, Baranwal, Li, You, "Sequence Parallelism: Long Sequence Training from System Perspective" (2021; ACL 2023),
section 3.2.

    ring of k: scores of my queries, all columns    ring of k: weights of my queries, once more
    softmax over whole rows                         ring of v: d_weights, all columns; dv rides behind
    ring of v: out += weights of its columns * v    d_scores = weights * (d_weights - rowsum(weights * d_weights))
                                                    ring of k: dq += d_scores of its columns * k; dk rides behind

It is here as the method that Ring Attention replaced: every rank holds scores ``[B, H/TP, T/SP, S]``, in the backward
pass twice, and computes hidden cells too. The paper keeps the weights for its backward pass; an operator that saves
(out, lse) rebuilds them by one more ring of keys. In turn dk and dv ride home summed, P - 1 shards each, where the
paper all-reduces them whole, 2 (P - 1) each: 5 (P - 1) shards in place of its 6 (P - 1).
Scores are plain matrix products in the accumulation dtype; it asks no local kernel, whatever attention.kernel says.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.attention.runtime.registry import AttentionCase, Strategy
from longctx.comm import Pending, exchange
from longctx.sequence import SequencePlan

# Letters of the einsums: b batch, q queries, k keys, h key/value heads, g query heads of each, d channels.


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    dtype, mine = accumulation_dtype(q.dtype), slice(0, len(call.plan.positions(call.group.rank)))
    scores = score_rows(q, k, call)
    row_lse = torch.logsumexp(scores, dim=-1)
    weights = _softmax(scores, row_lse)
    rows = _grouped(torch.zeros_like(q[:, mine], dtype=dtype), k)
    for _, columns, values in ring(v, call):
        rows += torch.einsum("bhgqk,bkhd->bqhgd", weights[..., columns], values.to(dtype))
    out = torch.zeros_like(q, dtype=dtype)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    out[:, mine] = rows.flatten(2, 3)
    lse[:, mine] = row_lse.permute(0, 3, 1, 2).flatten(2, 3)
    return out, lse


def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse = saved
    dtype, mine = accumulation_dtype(q.dtype), slice(0, len(call.plan.positions(call.group.rank)))
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    queries, upstream = _grouped(q[:, mine].to(dtype), k), _grouped(dout[:, mine].to(dtype), k)
    weights = _softmax(score_rows(q, k, call), _grouped(lse[:, mine], k).permute(0, 2, 3, 1))

    d_weights, values_home = torch.empty_like(weights), KeyGradientReturn(dv[:, mine], call)
    for hop, columns, values in ring(v, call):
        d_weights[..., columns] = torch.einsum("bqhgd,bkhd->bhgqk", upstream, values.to(dtype))
        values_home.add(hop, torch.einsum("bhgqk,bqhgd->bkhd", weights[..., columns], upstream))

    row_sums = (weights * d_weights).sum(dim=-1, keepdim=True)
    d_scores = weights.mul_(d_weights.sub_(row_sums)).mul_(call.scale)

    d_queries, keys_home = torch.zeros_like(queries), KeyGradientReturn(dk[:, mine], call)
    for hop, columns, keys in ring(k, call):
        d_queries += torch.einsum("bhgqk,bkhd->bqhgd", d_scores[..., columns], keys.to(dtype))
        keys_home.add(hop, torch.einsum("bhgqk,bqhgd->bkhd", d_scores[..., columns], queries))
    values_home.finish()
    keys_home.finish()
    dq[:, mine] = d_queries.flatten(2, 3)
    return dq, dk, dv


def score_rows(q: Tensor, k: Tensor, call: AttentionContext) -> Tensor:
    """Scaled scores of the local queries with all keys, ``[B, Hkv/TP, H/Hkv, T/SP, S]``, -inf where hidden.

    Columns are ordered by owner, as rank 0 holds them, then rank 1, and so on.
    """
    plan, me, dtype = call.plan, call.group.rank, accumulation_dtype(q.dtype)
    queries = _grouped(q[:, : len(plan.positions(me))].to(dtype), k)
    batch, count, kv_heads, per_key, _ = queries.shape
    scores = queries.new_empty(batch, kv_heads, per_key, count, plan.length)
    for _, columns, keys in ring(k, call):
        scores[..., columns] = torch.einsum("bqhgd,bkhd->bhgqk", queries, keys.to(dtype)).mul_(call.scale)
    return scores.masked_fill_(hidden(plan, me).to(scores.device, non_blocking=True), -torch.inf)


def hidden(plan: SequencePlan, rank: int) -> Tensor:
    """Bool ``[B, 1, 1, T/SP, S]``: keys, ordered by owner, that the local queries do not see."""
    keys = np.concatenate([plan.positions(owner) for owner in range(plan.world)])
    rows = []
    for documents in plan.documents:
        start, stop = plan.mask.key_range(plan.positions(rank), documents)
        rows.append((keys < start[:, None]) | (keys >= stop[:, None]))
    return torch.from_numpy(np.stack(rows))[:, None, None]


def ring(local: Tensor, call: AttentionContext) -> Iterator[tuple[int, slice, Tensor]]:
    """Yields (hop, columns, block) of every rank's keys or values, mine first, then those of the rank before me and
    so on, while the next block is in flight. ``local``: ``[B, T/SP, Hkv/TP, D]``."""
    counts, me, world = shard_lengths(call.plan), call.group.rank, call.group.size
    block = local[:, : counts[me]].contiguous()
    for hop in range(world):
        owner, following = (me - hop) % world, (me - hop - 1) % world
        passing = _to_next(block, counts[following], call) if hop < world - 1 else None
        first = sum(counts[:owner])
        yield hop, slice(first, first + counts[owner]), block
        if passing:
            [block] = passing.wait()


class KeyGradientReturn:
    """Gradients that ride one step behind their block, summed on the way; the last holder is the owner's neighbour.

    ``home``: the valid rows of this rank's own gradient, ``[B, T/SP, Hkv/TP, D]``, which it adds to.
    """

    def __init__(self, home: Tensor, call: AttentionContext) -> None:
        self._home = home
        self._call = call
        self._riding: Pending | None = None

    def add(self, hop: int, share: Tensor) -> None:
        """Takes this rank's share of the gradient of the block that it holds at ``hop``."""
        if hop == 0:
            self._home += share
            return
        if self._riding:
            share += self._riding.wait()[0]
        following = (self._call.group.rank - hop - 1) % self._call.group.size
        self._riding = _to_next(share.contiguous(), shard_lengths(self._call.plan)[following], self._call)

    def finish(self) -> None:
        if self._riding:
            self._home += self._riding.wait()[0]


def _to_next(block: Tensor, coming: int, call: AttentionContext) -> Pending:
    """Sends a block to the next rank; expects one of ``coming`` tokens from the rank before."""
    me, world = call.group.rank, call.group.size
    buffer = block.new_empty(block.shape[0], coming, *block.shape[2:])
    return exchange(call.group, [((me + 1) % world, block)], [((me - 1) % world, buffer)])


def shard_lengths(plan: SequencePlan) -> list[int]:
    """Valid tokens of every rank."""
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


def work(plan: SequencePlan, rank: int, inner: int) -> float:
    """Whole rows of scores, hidden ones too."""
    return len(plan.documents) * len(plan.positions(rank)) * plan.length


RSA = Strategy(
    "rsa",
    define_strategy("rsa", forward, backward),
    layout="contiguous",
    refuses=_refuses,
    work=work,
    costs="longctx.attention.costs.rsa:COSTS",
)
