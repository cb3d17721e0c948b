"""Core-attention disaggregation: attention is cut into tasks, and any rank computes any task for any other.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025), in place: every
rank is also a server. Servers keep nothing between the passes, so that the two passes may have different servers.

    forward:                                        backward, with an assignment of its own:
    send rows of q, k, v to their servers           send rows of q, dout, lse, delta and k, v to their servers
    attend in tasks that need no other rank         gradients of tasks that need no other rank
    attend in tasks whose rows have arrived         gradients of tasks whose rows have arrived
    return (out, lse) to the queries' owners        return dq, dk, dv to the rows' owners
    merge what each server returned                 add what each server returned, in the order of ranks

``longctx.planner`` assigns tasks to servers; queries and results live where the layout puts them. This file executes
any ``Plan``, as ``dispatch`` reads it. Zeppelin (2025) is the same with another planner. A token is sent once per
server, however many of its tasks read it. Delta is sent in the place of out (``longctx.attention.runtime.delta``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from longctx.attention.runtime.delta import delta_of, surrogate_out
from longctx.attention.runtime.operator import AttentionContext, Backward, Forward, Saved, define_strategy
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.dispatch import Bundle, Dispatch
from longctx.attention.strategies.disaggregated.prepared import (
    Dispatches,
    dispatches,
    dispatches_of,
    first_dispatch,
    prepared,
)
from longctx.comm import Group, Message, Pending, Relay, exchange
from longctx.errors import ConfigError
from longctx.planner import AttentionShape, Routes
from longctx.sequence import SequencePlan

Block = tuple[Tensor, ...]  # tensors of the same tokens, [1, rows, H/TP/G, ...]


def _shape(sizes: Sizes) -> AttentionShape:
    return AttentionShape(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.element)


def dispatches_for(plan: SequencePlan, planner: str, sizes: Sizes) -> Dispatches:
    """Returns the dispatches of both passes for tensors of these sizes."""
    return dispatches(plan, planner, _shape(sizes), sizes.topology)


def prepare(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> None:
    """Plans a batch before its first layer asks, and works out all that ``rank`` will ask for in both passes."""
    for dispatch in prepared(plan, planner, _shape(sizes), sizes.topology):
        dispatch.served(rank)
        for bundle in itertools.chain(*bundles_of(dispatch, sizes)):
            dispatch.routes(bundle)


class ForwardRun:
    """Computes attention of the local queries in three steps.

    It sends rows when it is made, computes in ``serve``, and merges in ``finish``.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, dispatch: Dispatch) -> None:
        self._served, self._context, self._shape = dispatch.served(context.group.rank), context, q.shape
        self._groups = dispatch.plan.groups
        self._rows = tuple(by_row(tensor, self._groups) for tensor in (q, k, v))
        self._dispatch, self._arriving = dispatch, IncomingTokens(dispatch, self._rows[:1], self._rows[1:], context)

    def serve(self) -> None:
        """Computes this rank's tasks and sends their results."""
        context, served, (q, k, v) = self._context, self._served, self._rows
        self._partial = Partial(q)
        context.kernel.forward(q, k, v, served.local, context.scale, self._partial)
        queries, keys, values = self._arriving.wait()
        remote = Partial(queries)
        context.kernel.forward(queries, keys, values, served.remote, context.scale, remote)
        self._returning = ReturnedResults((remote.out, remote.lse), (), self._dispatch, context)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Returns (out, lse) of the local queries.

        out ``[B, T/SP, H/TP, D]`` in the accumulation dtype, lse ``[B, T/SP, H/TP]``.
        """
        for server, returned in enumerate(self._returning.wait()):
            self._served.queries.merge(server, self._partial, returned)
        out, lse = (
            by_sequence(whole, self._shape[:2], self._groups) for whole in (self._partial.out, self._partial.lse)
        )
        return out, lse


class BackwardRun:
    """Computes gradients in the same three steps as ``ForwardRun``.

    Given the global lse and delta, the shares of tasks just add up.
    """

    def __init__(self, dout: Tensor, saved: Saved, context: AttentionContext, dispatch: Dispatch) -> None:
        self._served, self._context, self._shape = dispatch.served(context.group.rank), context, dout.shape
        self._groups = dispatch.plan.groups
        self._dout, *self._saved = (by_row(tensor, self._groups) for tensor in (dout, *saved))
        q, k, v, out, lse = self._saved
        of_queries = (q, self._dout, lse, delta_of(self._dout, out))
        self._dispatch, self._arriving = dispatch, IncomingTokens(dispatch, of_queries, (k, v), context)

    def serve(self) -> None:
        """Computes the gradients of this rank's tasks and sends them."""
        context, served, (q, k, v, out, lse) = self._context, self._served, self._saved
        dtype = accumulation_dtype(q.dtype)
        self._grads = _zeros((q, k, v), dtype)
        context.kernel.backward(self._dout, q, k, v, out, lse, served.local, context.scale, self._grads)
        queries, douts, lses, deltas, keys, values = self._arriving.wait()
        shares = _zeros((queries, keys, values), dtype)
        rows = (douts, queries, keys, values, surrogate_out(douts, deltas), lses)
        context.kernel.backward(*rows, served.remote, context.scale, shares)
        grad_dtype = q.dtype if context.options.grad_dtype == "compute" else dtype
        self._of_queries = ReturnedResults(shares[:1], (), self._dispatch, context, grad_dtype)
        self._of_keys = ReturnedResults((), shares[1:], self._dispatch, context, grad_dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv) of the local tokens in the accumulation dtype."""
        dq, dk, dv = self._grads
        queries, keys = self._served.queries, self._served.keys
        for returning, crossing, grads in ((self._of_queries, queries, (dq,)), (self._of_keys, keys, (dk, dv))):
            for server, shares in enumerate(returning.wait()):
                for grad, share in zip(grads, shares, strict=True):
                    crossing.add(server, grad, share)
        dq, dk, dv = (by_sequence(whole, self._shape[:2], self._groups) for whole in self._grads)
        return dq, dk, dv


def _zeros(like: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros_like(tensor, dtype=dtype) for tensor in like)
    return q, k, v


def planned_by(planner: str) -> tuple[Forward, Backward]:
    """Returns both passes of attention whose tasks ``planner`` assigns."""

    def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        run = ForwardRun(q, k, v, context, dispatches_of(context, planner, q, k)[0])
        run.serve()
        return run.finish()

    def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        run = BackwardRun(dout, saved, context, dispatches_of(context, planner, *saved[:2])[1])
        run.serve()
        return run.finish()

    return forward, backward


def by_row(tensor: Tensor, groups: int = 1) -> Tensor:
    """Lays out a tensor as local rows of each heads group, one group behind the other.

    ``[B, T/SP, H/TP, ...]`` to ``[1, G * B * T/SP, H/TP/G, ...]``: a task may be of any batch row and group.
    """
    if tensor.shape[2] % groups:
        raise ConfigError(
            f"a plan of {groups} heads groups cannot be served with {tensor.shape[2]} heads of a rank; it must "
            f"divide those, such as {math.gcd(groups, tensor.shape[2])}"
        )
    return tensor.flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1).unsqueeze(0)


def by_sequence(rows: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Undoes ``by_row``. ``shape``: (B, T/SP)."""
    return rows[0].unflatten(0, (groups, shape.numel())).transpose(0, 1).flatten(1, 2).unflatten(0, shape)


class IncomingTokens:
    """Sends local tokens to those who compute for them, and receives those that this rank computes for.

    ``of_queries``: tensors of query rows; ``of_keys``: keys and values.
    """

    def __init__(self, dispatch: Dispatch, of_queries: Block, of_keys: Block, context: AttentionContext) -> None:
        self._me = context.group.rank
        served = dispatch.served(self._me)
        self._parts = [(served.queries, part) for part in of_queries] + [(served.keys, part) for part in of_keys]
        sends, receives = [], []
        for other in context.group.others:
            for crossing, part in self._parts:
                sends.append((other, crossing.read(other, part).contiguous()))
                receives.append((other, part.new_empty(1, crossing.sent(other), *part.shape[2:])))
        bundle = Bundle(_widths(of_queries), _widths(of_keys))
        self._pending = _post(context.group, dispatch.routes(bundle), sends, receives)

    def wait(self) -> list[Tensor]:
        """Returns the buffers, ``[1, rows, H/TP/G, ...]``: those of queries, then of keys.

        Rows are in order of heads group, document and position.
        """
        arrived, number = self._pending.wait(), len(self._parts)
        by_owner = [arrived[first : first + number] for first in range(0, len(arrived), number)]
        by_owner.insert(self._me, [crossing.read(self._me, part) for crossing, part in self._parts])
        whole = zip(zip(*by_owner, strict=True), self._parts, strict=True)
        return [crossing.buffer(parts) for parts, (crossing, _) in whole]


def _widths(block: Block, dtypes: Sequence[torch.dtype] = ()) -> tuple[int, ...]:
    """Bytes of a row of each tensor, in these dtypes or its own."""
    return tuple(
        math.prod(part.shape[2:]) * dtype.itemsize
        for part, dtype in zip(block, dtypes or [part.dtype for part in block], strict=True)
    )


def _post(group: Group, routed: Routes | None, sends: list[Message], receives: list[Message]) -> Pending | Relay:
    return exchange(group, sends, receives) if routed is None else Relay(group, sends, receives, routed.of(group.rank))


class ReturnedResults:
    """Sends results to the owners of their rows, of queries or of keys, and receives those of local rows.

    ``of_queries`` or ``of_keys``: by place in the server's buffer, the other empty. ``dtype``: what it is sent in, by
    default its own.
    """

    def __init__(
        self,
        of_queries: Block,
        of_keys: Block,
        dispatch: Dispatch,
        context: AttentionContext,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._me, block = context.group.rank, of_queries or of_keys
        served = dispatch.served(self._me)
        crossing, self._number = (served.queries if of_queries else served.keys), len(block)
        self._own = tuple(crossing.picked(self._me, part, part.dtype) for part in block)
        dtypes = [dtype or part.dtype for part in block]
        sends, receives = [], []
        for other in context.group.others:
            for part, its in zip(block, dtypes, strict=True):
                sends.append((other, crossing.picked(other, part, its)))
                receives.append((other, part.new_empty(1, crossing.asked(other), *part.shape[2:], dtype=its)))
        widths = _widths(block, dtypes)
        bundle = Bundle(widths, (), returns=True) if of_queries else Bundle((), widths, returns=True)
        self._pending = _post(context.group, dispatch.routes(bundle), sends, receives)

    def wait(self) -> Iterator[Block]:
        """Yields each server's results, in the order of ranks, so that sums do not depend on who came first."""
        arrived = self._pending.wait()
        blocks = [arrived[first : first + self._number] for first in range(0, len(arrived), self._number)]
        blocks.insert(self._me, list(self._own))
        yield from map(tuple, blocks)


def bundles_of(dispatch: Dispatch, sizes: Sizes) -> tuple[list[Bundle], list[Bundle]]:
    """Returns what the exchanges of the forward and of the backward pass move."""
    one = of_a_row(sizes, dispatch)
    compute = sizes.options.grad_dtype == "compute"
    dq, dk = (one.queries, one.keys) if compute else (one.query_gradients, one.key_gradients)
    forward = [Bundle((one.queries,), (one.keys,) * 2), Bundle((one.query_gradients, one.lse), (), returns=True)]
    inputs = Bundle((one.queries,) * 2 + (one.lse,) * 2, (one.keys,) * 2)
    return forward, [inputs, Bundle((dq,), (), returns=True), Bundle((), (dk,) * 2, returns=True)]


def of_a_row(sizes: Sizes, dispatch: Dispatch) -> Sizes:
    """Returns the sizes of a local row, which is one token of one batch row and one heads group."""
    groups = dispatch.plan.groups
    return replace(sizes, batch=1, heads=sizes.heads // groups, kv_heads=sizes.kv_heads // groups)


def work(planner: str, plan: SequencePlan, rank: int, inner: int) -> float:
    """Returns the cells that a rank computes in the forward pass, as it was planned first."""
    return first_dispatch(plan, planner).cells(rank)


# The strategy's name -> who plans for it.
PLANNERS = {"disaggregated": "cad", "zeppelin": "zeppelin"}


def _strategy(name: str, ping_pong: bool = False) -> Strategy:
    planner = PLANNERS[name]
    return Strategy(
        name,
        define_strategy(name, *planned_by(planner)),
        layout="contiguous",
        options=frozenset({"grad_dtype"}),
        serves_tasks=True,
        ping_pong=ping_pong,
        work=partial(work, planner),
        prepare=partial(prepare, planner),
        costs=f"longctx.attention.costs.disaggregated:{planner.upper()}",
    )


DISAGGREGATED = _strategy("disaggregated", ping_pong=True)
ZEPPELIN = _strategy("zeppelin")
