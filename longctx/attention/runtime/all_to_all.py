"""Attention between two swaps of axes: Ulysses, and whatever goes on between rows of a grid, as one operator.

    start bringing the first heads
    for each group of my heads:                    backward:
        start bringing the next group                  the same for dout
        attention of all the row's tokens              its gradients
        start sending out home                         start sending dq, dk, dv home

so that all swaps but the first and the last hide behind the computing of other heads. What attention computes between
the rows is a strategy's pair of passes: local for Ulysses, the ring for USP. Its inputs and outputs are kept for the
backward pass as they lie in the row, so that they do not travel again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longctx.attention.runtime.head_sharding import GridRow, HeadGroups, ToHeads, ToTokens, sum_copies
from longctx.attention.runtime.operator import (
    Attend,
    AttentionContext,
    Backward,
    Forward,
    Saved,
    call_of,
    register,
    require_fit,
)
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import group_named
from longctx.errors import ConfigError

# Without defaults, for torch leaves out arguments that equal them, and where a list is returned it wants a gradient of
# just as many as were given.
_CONTEXT = "Tensor plan, str group, str kernel, float scale, str options"


def forward_in_rows(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionContext, attend: Forward
) -> tuple[Tensor, list[Saved]]:
    """q ``[B, T/SP, H, D]``, k and v ``[B, T/SP, Hkv, D]`` to out of the local tokens, and what backward takes of each
    group of heads: q, k, v, out ``[B, T/SP·u, heads, D]`` and lse ``[B, T/SP·u, heads]``."""
    row, inside = GridRow.of(call.plan, call.group), _inside(call)
    groups = HeadGroups.of(q.shape[2], k.shape[2], row.group.size)
    home = OutputAssembly(row, groups, q[:, :, :0], ((q.shape[2], q.dtype),))
    coming = [_bring(q, k, v, row, groups, 0)]
    kept: list[Saved] = []
    for group in range(groups.count):
        if group + 1 < groups.count:
            coming.append(_bring(q, k, v, row, groups, group + 1))
        inputs = _in_order(coming.pop(0), row, groups, group)
        out, lse = attend(*inputs, inside)
        kept.append((*inputs, out.to(q.dtype), lse))
        del out
        home.send(kept[-1][3:4], group)
    [whole] = home.finish()
    return whole, kept


def backward_in_rows(
    dout: Tensor, kept: Sequence[Saved], call: AttentionContext, kv_heads: int, differentiate: Backward
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v; those of key/value heads that ranks share are summed."""
    row, inside, dtype = GridRow.of(call.plan, call.group), _inside(call), dout.dtype
    groups = HeadGroups.of(dout.shape[2], kv_heads, row.group.size)
    keys = (kv_heads, accumulation_dtype(dtype) if groups.shared else dtype)
    home = OutputAssembly(row, groups, dout[:, :, :0], ((dout.shape[2], dtype), keys, keys), groups.shared)
    coming = [_bring_upstream(dout, row, groups, 0)]
    for group, saved in enumerate(kept):
        if group + 1 < groups.count:
            coming.append(_bring_upstream(dout, row, groups, group + 1))
        [upstream] = coming.pop(0).wait()
        grads = differentiate(upstream, saved, inside)
        del upstream
        grads = _unshared(grads, dtype, row, groups, group)
        home.send(grads, group)
        del grads
    dq, dk, dv = home.finish()
    return dq, dk.to(dtype), dv.to(dtype)


class OutputAssembly:
    """Whole tensors of the local tokens, ``[B, T/SP, heads, D]``, which come home group by group of all ranks' heads.

    ``like``: what else they are like. ``wholes``: heads and dtype of each, the first of queries, others of keys.
    ``sums``: ranks share heads of these. They are made when the first group leaves.
    """

    def __init__(
        self,
        row: GridRow,
        groups: HeadGroups,
        like: Tensor,
        wholes: tuple[tuple[int, torch.dtype], ...],
        sums: bool = False,
    ) -> None:
        self._row, self._groups, self._like, self._sums = row, groups, like, sums
        self._shapes = wholes
        self._wholes: list[Tensor] = []
        self._under_way: ToTokens | None = None

    def send(self, shares: tuple[Tensor, ...], group: int) -> None:
        """Of the row's tokens in this rank's heads of the group; the group before has come home while they were
        computed."""
        self._land()
        if not self._wholes:
            self._wholes = [self._made(heads, dtype) for heads, dtype in self._shapes]
        rooms = [self._rooms(rank, group) for rank in range(self._groups.ranks)]
        self._under_way = ToTokens(self._row, shares, rooms, self._sums)

    def finish(self) -> list[Tensor]:
        self._land()
        return self._wholes

    def _land(self) -> None:
        if self._under_way:
            self._under_way.wait()
            self._under_way = None

    def _made(self, heads: int, dtype: torch.dtype) -> Tensor:
        batch, shard, _, dim = self._like.shape
        whole = self._like.new_empty(batch, shard, heads, dim, dtype=dtype)
        return whole if self._row.valid == shard and not self._sums else whole.zero_()

    def _rooms(self, rank: int, group: int) -> list[Tensor]:
        queries, *keys = self._wholes
        read = self._groups.split.key_heads(self._groups.part(rank, group))
        parts = [(queries, self._groups.heads(rank, group)), *((whole, read) for whole in keys)]
        return [whole[:, : self._row.valid, some] for whole, some in parts]


def _inside(call: AttentionContext) -> AttentionContext:
    """Attention between rows: of all the row's tokens, over the column of this rank."""
    assert call.group.inner is not None and call.group.outer is not None, "StrategyAttention makes the grid"
    return replace(call, plan=call.plan.joined(call.group.inner.size), group=call.group.outer)


def _bring(q: Tensor, k: Tensor, v: Tensor, row: GridRow, groups: HeadGroups, group: int) -> ToHeads:
    """Each rank its group's heads of q, k and v, side by side."""
    parts = []
    for rank in range(groups.ranks):
        queries, keys = groups.heads(rank, group), groups.split.key_heads(groups.part(rank, group))
        parts.append([whole[:, : row.valid, some] for whole, some in ((q, queries), (k, keys), (v, keys))])
    return ToHeads(row, parts)


def _bring_upstream(dout: Tensor, row: GridRow, groups: HeadGroups, group: int) -> ToHeads:
    return ToHeads(row, [[dout[:, : row.valid, groups.heads(rank, group)]] for rank in range(groups.ranks)])


def _in_order(arriving: ToHeads, row: GridRow, groups: HeadGroups, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the group that has arrived, with copies of key/value heads where a kernel wants them."""
    queries, keys, values = arriving.wait()
    copies = groups.split.copies(groups.part(row.group.rank, group))
    return (queries, keys, values) if copies is None else (queries, keys[:, :, copies], values[:, :, copies])


def _unshared(
    found: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, row: GridRow, groups: HeadGroups, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype in which they travel; copies of a key/value head are summed."""
    dq, dk, dv = found
    part = groups.part(row.group.rank, group)
    copies = groups.split.copies(part)
    if copies is not None:
        dk, dv = (sum_copies(grad, copies, groups.split.keys(part)) for grad in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _require_shares(q: Tensor, call: AttentionContext) -> None:
    """The configuration refuses it by name; users of the library find out here."""
    ranks = call.group.inner.size if call.group.inner else 1
    if q.shape[2] % ranks:
        raise ConfigError(
            f"{q.shape[2]} query heads must divide by the {ranks} ranks of a row that share them; nearest valid: "
            f"{max(1, q.shape[2] // ranks) * ranks} heads, or a strategy that shares no heads, such as gather"
        )


def swapped(name: str, attend: Forward, differentiate: Backward) -> Attend:
    """Registers ``longctx::<name>`` and ``longctx::<name>_backward``: attention over the columns of a grid by a pair
    of passes, whose rows swap tokens for heads before and after it.

    The lse that it returns is of the row's tokens and the last group of this rank's heads.
    """

    def run_forward(q: Tensor, k: Tensor, v: Tensor, *context: Any) -> tuple[Tensor, list[Tensor]]:
        call = call_of(q, k, *context)
        require_fit(q, call.plan, call.group)
        _require_shares(q, call)
        out, kept = forward_in_rows(q, k, v, call, attend)
        return out, [tensor for saved in kept for tensor in saved]

    def run_backward(dout: Tensor, kept: list[Tensor], kv_heads: int, *context: Any) -> tuple[Tensor, Tensor, Tensor]:
        saved = [_saved(kept[first : first + 5]) for first in range(0, len(kept), 5)]
        return backward_in_rows(dout, saved, call_of(kept[0], kept[1], *context), kv_heads, differentiate)

    forward_op = register(name, run_forward, f"(Tensor q, Tensor k, Tensor v, {_CONTEXT}) -> (Tensor, Tensor[])")
    backward_op = register(
        f"{name}_backward",
        run_backward,
        f"(Tensor dout, Tensor[] kept, int kv_heads, {_CONTEXT}) -> (Tensor, Tensor, Tensor)",
    )

    @forward_op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, *names: Any) -> tuple[Tensor, list[Tensor]]:
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

    @backward_op.register_fake
    def _(dout: Tensor, kept: list[Tensor], kv_heads: int, *context: Any) -> tuple[Tensor, Tensor, Tensor]:
        keys = dout.new_empty(*dout.shape[:2], kv_heads, dout.shape[3])
        return dout.new_empty(dout.shape), keys, torch.empty_like(keys)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
        _, k, _, plan, *ctx.names = inputs
        ctx.kv_heads = k.shape[2]
        ctx.save_for_backward(*output[1], plan)
        ctx.mark_non_differentiable(*output[1])
        ctx.set_materialize_grads(False)

    def differentiate_operator(ctx: Any, dout: Tensor | None, _kept: Any) -> tuple[Tensor | None, ...]:
        context = (None,) * (1 + len(ctx.names))
        if dout is None:
            return (None, None, None, *context)
        *kept, plan = ctx.saved_tensors
        return (*backward_op(dout, kept, ctx.kv_heads, plan, *ctx.names), *context)

    forward_op.register_autograd(differentiate_operator, setup_context=remember)

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, *names: Any) -> tuple[Tensor, Tensor]:
        out, kept = forward_op(q, k, v, plan, group, *names)
        return out, kept[-1]

    return run


def _saved(kept: list[Tensor]) -> Saved:
    q, k, v, out, lse = kept
    return q, k, v, out, lse
