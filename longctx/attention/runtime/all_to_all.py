"""Attention between two all-to-alls, as one operator: Ulysses, or USP with a ring between rows of a grid.

    forward:                                       backward:
    all-to-all of q, k, v of the first group       all-to-all of dout of the first group
    for each group of my heads:                    for each group of my heads:
        start the all-to-all of the next group         start the all-to-all of the next group
        out of all the row's tokens                    dq, dk, dv of all the row's tokens
        start the all-to-all of out, back              start the all-to-all of dq, dk, dv, back

So all exchanges but the first and the last hide behind the computing of other heads. What attention computes between
them is a strategy's pair of passes: local for Ulysses, the ring for USP. Its inputs and outputs are kept for the
backward pass as they lie in the row, so that they are not sent again.

Tokens of a row arrive in order of position, as its joined plan (``SequencePlan.joined``) has them. So layouts,
documents and windows are whatever that plan says. ``runtime.head_sharding`` says which rank has which heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longctx.attention.runtime.borders import dense, require_numbers
from longctx.attention.runtime.head_sharding import HeadGroups
from longctx.attention.runtime.operator import (
    QKV,
    Attend,
    AttentionContext,
    Backward,
    Forward,
    Saved,
    admitted,
    context_of,
    require_fit,
)
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import Group, Pending, exchange, group_named
from longctx.errors import ConfigError
from longctx.operators import Gradient, define_operator
from longctx.sequence import Places, row_places

# Of k backward is given the number of heads alone; it comes last, so that it stands where torch leaves nothing out.
_CONTEXT = "Tensor plan, str group, str kernel, float scale, str options, int kv_heads"


def forward_in_rows(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, attend: Forward
) -> tuple[Tensor, list[Saved]]:
    """Computes attention of the local tokens between two all-to-alls, one group of heads after another.

    q ``[B, T/SP, H, D]``, k and v ``[B, T/SP, Hkv, D]``. Returns out of the local tokens and what the backward pass
    needs of each group of heads. With u ranks in a row that is q, k, v, out ``[B, T/SP·u, heads, D]`` and lse ``[B,
    T/SP·u, heads]``.
    """
    row, column = GridRow.of(context, q.shape[2], k.shape[2]), _over_column(context)
    assembly = OutputAssembly(row, q[:, :, :0], ((q.shape[2], q.dtype),))
    pending = [AllToAll(row, (q, k, v), 0)]
    kept: list[Saved] = []
    for group in range(row.heads.count):
        if group + 1 < row.heads.count:
            pending.append(AllToAll(row, (q, k, v), group + 1))
        inputs = _with_copies(pending.pop(0).wait(), row, group)
        out, lse = attend(*inputs, column)
        kept.append((*inputs, out.to(q.dtype), lse))
        del out
        assembly.send(kept[-1][3:4], group)
    [whole] = assembly.finish()
    return whole, kept


def backward_in_rows(
    dout: Tensor, kept: Sequence[Saved], context: AttentionContext, kv_heads: int, attend_backward: Backward
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the local q, k, v; those of key/value heads that ranks share are summed."""
    row, column, dtype = GridRow.of(context, dout.shape[2], kv_heads), _over_column(context), dout.dtype
    keys = (kv_heads, accumulation_dtype(dtype) if row.heads.shared else dtype)
    assembly = OutputAssembly(row, dout[:, :, :0], ((dout.shape[2], dtype), keys, keys), row.heads.shared)
    pending = [AllToAll(row, (dout,), 0)]
    for group, saved in enumerate(kept):
        if group + 1 < row.heads.count:
            pending.append(AllToAll(row, (dout,), group + 1))
        [row_dout] = pending.pop(0).wait()
        grads = attend_backward(row_dout, saved, column)
        del row_dout
        grads = _without_copies(grads, dtype, row, group)
        assembly.send(grads, group)
        del grads
    dq, dk, dv = assembly.finish()
    return dq, dk.to(dtype), dv.to(dtype)


def _over_column(context: AttentionContext) -> AttentionContext:
    """Attention between rows: of all the row's tokens, over the column of this rank."""
    assert context.group.inner is not None and context.group.outer is not None, "StrategyAttention makes the grid"
    return replace(context, plan=context.plan.joined(context.group.inner.size), group=context.group.outer)


def _with_copies(found: Sequence[Tensor], row: GridRow, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a group, with copies of key/value heads where a kernel wants them."""
    queries, keys, values = found
    copies = row.heads.copies(row.group.rank, group)
    return (queries, keys, values) if copies is None else (queries, keys[:, :, copies], values[:, :, copies])


def _without_copies(
    grads: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, row: GridRow, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype in which they are sent; those of copies of a key/value head are summed."""
    dq, dk, dv = grads
    copies, heads = row.heads.copies(row.group.rank, group), row.heads.key_heads(row.group.rank, group)
    if copies is not None:
        dk, dv = (_sum_copies(grad, copies, heads.stop - heads.start) for grad in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _sum_copies(grad: Tensor, copies: list[int], heads: int) -> Tensor:
    total = grad.new_zeros(*grad.shape[:2], heads, grad.shape[3], dtype=accumulation_dtype(grad.dtype))
    total.index_add_(2, torch.tensor(copies, device=grad.device), grad.to(total.dtype))
    return total.to(grad.dtype)


@dataclass(frozen=True)
class GridRow:
    """Describes a row of the grid from one of its ranks: which tokens and which heads are whose.

    ``tokens``: physical ones, T/SP of this rank times ranks: a constant of the run.
    """

    group: Group
    places: Places  # of each rank's valid tokens among the row's
    tokens: int
    heads: HeadGroups

    @classmethod
    def of(cls, context: AttentionContext, heads: int, kv_heads: int) -> GridRow:
        plan, inner = context.plan, context.group.inner
        assert inner is not None, "StrategyAttention makes the grid"
        places = row_places(plan, inner.size, context.group.rank // inner.size)
        return cls(inner, places, inner.size * plan.shard, HeadGroups.of(heads, kv_heads, inner.size))

    @property
    def valid(self) -> int:
        """Returns how many tokens of this rank are no padding."""
        return self.places.counts[self.group.rank]

    def views(self, tensors: Sequence[Tensor], rank: int, group: int) -> list[Tensor]:
        """Returns views of local tokens in the heads that belong to a rank's group, ``[B, valid, heads, D]``.

        The first tensor has query heads, the others key/value heads.
        """
        queries, keys = self.heads.query_heads(rank, group), self.heads.key_heads(rank, group)
        return [whole[:, : self.valid, keys if number else queries] for number, whole in enumerate(tensors)]

    def buffer(self, like: Tensor) -> Tensor:
        """Returns a buffer for all tokens of the row, ``[B, T/SP·u, heads, D]``; padding is 0."""
        shape = (like.shape[0], self.tokens, *like.shape[2:])
        return like.new_empty(shape) if sum(self.places.counts) == self.tokens else like.new_zeros(shape)

    def exchange(self, parts: dict[int, Tensor], heads: Sequence[int], tokens: Sequence[int]) -> Pending:
        """Starts an all-to-all: sends ``parts[r]`` to rank r of the row.

        ``heads``, ``tokens``: of what comes from each rank.
        """
        first = next(iter(parts.values()), None)
        if first is None:
            return exchange(self.group, [], [])
        shapes = [(first.shape[0], tokens[rank], heads[rank], first.shape[3]) for rank in self.group.others]
        receives = [(rank, first.new_empty(shape)) for rank, shape in zip(self.group.others, shapes, strict=True)]
        return exchange(self.group, list(parts.items()), receives)


class AllToAll:
    """Sends tensors of local tokens to the ranks that compute a group of their heads.

    Tensors ``[B, T/SP, heads, D]`` go side by side, in one message per rank.
    """

    def __init__(self, row: GridRow, tensors: Sequence[Tensor], group: int) -> None:
        parts = [row.views(tensors, rank, group) for rank in range(row.group.size)]
        self._row, self._own = row, parts[row.group.rank]
        self._widths = [part.shape[2] for part in self._own]
        packed = {rank: torch.cat(parts[rank], dim=2) for rank in row.group.others}
        self._pending = row.exchange(packed, [sum(self._widths)] * row.group.size, row.places.counts)

    def wait(self) -> list[Tensor]:
        """Returns each tensor of the row's tokens in order of position, ``[B, T/SP·u, heads, D]``; padding is 0."""
        row = self._row
        wholes = [row.buffer(part) for part in self._own]
        for whole, part in zip(wholes, self._own, strict=True):
            row.places.put(row.group.rank, part, whole)
        for rank, message in zip(row.group.others, self._pending.wait(), strict=True):
            for whole, part in zip(wholes, message.split(self._widths, dim=2), strict=True):
                row.places.put(rank, part, whole)
        return wholes


class OutputAssembly:
    """Assembles tensors of the local tokens, ``[B, T/SP, heads, D]``, from the ranks that computed their heads.

    They arrive group by group of heads. ``like``: what else they are like. ``wholes``: heads and dtype of each, the
    first of queries, others of keys. ``sums``: ranks share heads of these. What comes is then added, this rank's own
    first and then in the order of ranks.
    """

    def __init__(
        self, row: GridRow, like: Tensor, wholes: tuple[tuple[int, torch.dtype], ...], sums: bool = False
    ) -> None:
        self._row, self._like, self._sums, self._shapes = row, like, sums, wholes
        self._wholes: list[Tensor] = []  # made when the first group leaves
        self._in_flight: tuple[int, Pending] | None = None

    def send(self, shares: tuple[Tensor, ...], group: int) -> None:
        """Sends results of the row's tokens in this rank's heads of a group to the tokens' owners.

        What was sent for the group before has arrived while this one was computed.
        """
        row, me = self._row, self._row.group.rank
        self._receive()
        if not self._wholes:
            self._wholes = [self._zeros_or_empty(heads, dtype) for heads, dtype in self._shapes]
        packed = {rank: self._packed(shares, rank) for rank in row.group.others}
        widths = [sum(part.shape[2] for part in row.views(self._wholes, rank, group)) for rank in range(row.group.size)]
        self._in_flight = group, row.exchange(packed, widths, [row.valid] * row.group.size)
        if self._sums:
            self._add(me, group, self._packed(shares, me))
        else:
            for share, whole in zip(shares, row.views(self._wholes, me, group), strict=True):
                row.places.pick(me, share, whole)

    def finish(self) -> list[Tensor]:
        """Returns the assembled tensors."""
        self._receive()
        return self._wholes

    def _receive(self) -> None:
        if self._in_flight:
            group, pending = self._in_flight
            for rank, message in zip(self._row.group.others, pending.wait(), strict=True):
                self._add(rank, group, message)
            self._in_flight = None

    def _add(self, rank: int, group: int, message: Tensor) -> None:
        wholes = self._row.views(self._wholes, rank, group)
        for whole, part in zip(wholes, message.split([one.shape[2] for one in wholes], dim=2), strict=True):
            if self._sums:
                whole.add_(part)
            else:
                whole.copy_(part)

    def _packed(self, shares: tuple[Tensor, ...], rank: int) -> Tensor:
        """The rank's tokens, of all tensors side by side."""
        batch, _, _, dim = shares[0].shape
        widths, places = [share.shape[2] for share in shares], self._row.places
        packed = shares[0].new_empty(batch, places.counts[rank], sum(widths), dim)
        for share, part in zip(shares, packed.split(widths, dim=2), strict=True):
            places.pick(rank, share, part)
        return packed

    def _zeros_or_empty(self, heads: int, dtype: torch.dtype) -> Tensor:
        batch, shard, _, dim = self._like.shape
        whole = self._like.new_empty(batch, shard, heads, dim, dtype=dtype)
        return whole if self._row.valid == shard and not self._sums else whole.zero_()


def _require_shares(q: Tensor, context: AttentionContext) -> None:
    """The configuration refuses it by name; users of the library find out here."""
    ranks = context.group.inner.size if context.group.inner else 1
    if q.shape[2] % ranks:
        raise ConfigError(
            f"{q.shape[2]} query heads must divide by the {ranks} ranks of a row that share them; nearest valid: "
            f"{max(1, q.shape[2] // ranks) * ranks} heads, or a strategy that shares no heads, such as gather"
        )


def define_ulysses(name: str, attend: Forward, attend_backward: Backward) -> Attend:
    """Registers attention between two all-to-alls: ``longctx::<name>`` and ``longctx::<name>_backward``.

    ``attend`` and ``attend_backward`` compute attention over the columns of the grid. The lse that the operator returns
    is of the row's tokens and the last group of this rank's heads.
    """

    def run_forward(q: Tensor, k: Tensor, v: Tensor, *names: Any) -> tuple[Tensor, list[Tensor]]:
        q, k, v, context = admitted(q, k, v, *names[:-1])
        _require_shares(q, context)
        out, kept = forward_in_rows(q, k, v, context, attend)
        return out, [tensor for saved in kept for tensor in saved]

    def run_backward(dout: Tensor, kept: list[Tensor], *names: Any) -> tuple[Tensor, Tensor, Tensor]:
        saved = [_saved(kept[first : first + 5]) for first in range(0, len(kept), 5)]
        context = context_of(kept[0], kept[1], *names[:-1])
        require_numbers({"dout": dout, "q": kept[0]})
        require_fit(dout, context.plan, context.group)
        return backward_in_rows(dense(dout), saved, context, names[-1], attend_backward)

    schema = f"({QKV}, {_CONTEXT}) -> (Tensor out, Tensor[] kept)"
    gradient = Gradient(run_backward, ("kept",), ("q", "k", "v"), _gradient_shapes)
    operator = define_operator(name, schema, run_forward, _shapes, gradient)

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, *names: Any) -> tuple[Tensor, Tensor]:
        kernel, scale, options = (*names, "")[:3]
        out, kept = operator(q, k, v, plan, group, kernel, scale, options, k.shape[2])
        return out, kept[-1]

    return run


def _shapes(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, *_: Any) -> tuple[Tensor, list[Tensor]]:
    inner = group_named(group).inner
    assert inner is not None, "StrategyAttention makes the grid"
    groups = HeadGroups.of(q.shape[2], k.shape[2], inner.size)
    rows, dtype = (q.shape[0], q.shape[1] * inner.size), accumulation_dtype(q.dtype)
    kept = []
    for number in range(groups.count):
        keys = groups.split.local_keys(groups.part(inner.rank, number))
        shapes = [(heads, q.shape[3]) for heads in (groups.split.queries, keys, keys, groups.split.queries)]
        kept += [q.new_empty(*rows, *shape) for shape in shapes]
        kept.append(q.new_empty(*rows, groups.split.queries, dtype=dtype))
    return q.new_empty(q.shape), kept


def _gradient_shapes(dout: Tensor, kept: list[Tensor], *names: Any) -> tuple[Tensor, Tensor, Tensor]:
    keys = dout.new_empty(*dout.shape[:2], names[-1], dout.shape[3])
    return dout.new_empty(dout.shape), keys, torch.empty_like(keys)


def _saved(kept: list[Tensor]) -> Saved:
    q, k, v, out, lse = kept
    return q, k, v, out, lse
