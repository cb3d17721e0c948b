"""Core-attention disaggregation: attention is cut into tasks, and any rank computes any task for any other.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025), in place: every
rank is also a server. Servers are stateless: they keep nothing between the passes, so that the two passes may be
served by different ranks.

    forward:                                        backward, of its own tasks:
    send q, k, v rows to their servers              send q, dout, lse, delta and k, v rows to their servers
    attend to what is all mine                      gradients of what is all mine
    attend to what has arrived                      gradients of what has arrived
    send (out, lse) home                            send dq, dk, dv home
    merge what the servers of my queries found      add up, server by server in the order of ranks

``longctx.planner`` assigns tasks to servers, with queries at home where the layout has them; this file executes any
``Plan``, as ``dispatch`` reads it. Zeppelin (2025) is the same with another planner. A token crosses once per server,
however many of its tasks read it. Delta travels in the place of O (``longctx.attention.runtime.delta``).
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from longctx.attention.runtime.delta import delta_of, stand_in
from longctx.attention.runtime.operator import AttentionContext, Backward, Forward, Saved, define_operator
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import Strategy
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.assignment import fitting, one_node, planned, topology_of
from longctx.attention.strategies.disaggregated.dispatch import Bundle, Dispatch
from longctx.comm import Group, Message, Pending, Relay, exchange
from longctx.errors import ConfigError
from longctx.planner import AttentionShape, Plan, Routes, Topology
from longctx.sequence import Places, Rows, SequencePlan, TokenOwnership

Block = tuple[Tensor, ...]  # tensors of the same tokens, [1, rows, H/TP/G, ...]
Dispatches = tuple[Dispatch, Dispatch]  # of the forward and of the backward pass

# Of the planner's name and what it was asked for; None: whatever that is.
_dispatches: weakref.WeakKeyDictionary[
    SequencePlan, dict[tuple[str, tuple[AttentionShape, Topology] | None], Dispatches]
] = weakref.WeakKeyDictionary()


def assign(plan: SequencePlan, forward: Plan, backward: Plan | None = None, planner: str = "cad") -> None:
    """Serves the batch of this plan so, in place of what ``planner`` would say. Raises ConfigError for a plan of other
    tokens or another mask, or that is not legal."""
    homes = TokenOwnership.of(plan)
    there, back = (Dispatch(homes, fitting(homes, one)) for one in (forward, backward or forward))
    _dispatches.setdefault(plan, {})[planner, None] = there, back


def dispatches(
    plan: SequencePlan, planner: str, widths: AttentionShape, topology: Topology | None = None
) -> Dispatches:
    """Planned at first use, for heads of these ``widths`` and ranks on one node, or as ``topology`` has them; all ranks
    come to the same."""
    known = _dispatches.setdefault(plan, {})
    topology = topology or one_node(plan.world)
    key = (planner, None if (planner, None) in known else (widths, topology))
    if key not in known:
        homes = TokenOwnership.of(plan)
        known[key] = (Dispatch(homes, planned(homes, planner, widths, topology), topology),) * 2
    return known[key]


def dispatches_for(plan: SequencePlan, planner: str, sizes: Sizes) -> Dispatches:
    return dispatches(
        plan, planner, AttentionShape(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.element), sizes.topology
    )


def dispatches_of(call: AttentionContext, planner: str, q: Tensor, k: Tensor) -> Dispatches:
    """Those of an operator's call with queries and keys such as these."""
    return dispatches(call.plan, planner, widths_of(q, k), topology_of(call.group.ranks))


def prepare(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> None:
    """Plans a batch before its first layer asks, and works out all that ``rank`` will ask for in both passes."""
    for dispatch in dispatches_for(plan, planner, sizes):
        dispatch.served(rank)
        for bundle in itertools.chain(*bundles_of(dispatch, sizes)):
            dispatch.routes(bundle)


def widths_of(q: Tensor, k: Tensor) -> AttentionShape:
    return AttentionShape(q.shape[2], k.shape[2], q.shape[3], q.element_size())


class ForwardRun:
    """Attention of the local queries under way: posted when made, computed by ``serve``, complete after ``finish``."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionContext, dispatch: Dispatch) -> None:
        self._served, self._call, self._shape = dispatch.served(call.group.rank), call, q.shape
        self._groups = dispatch.plan.groups
        self._line = tuple(in_line(tensor, self._groups) for tensor in (q, k, v))
        self._dispatch, self._arriving = dispatch, Arriving(dispatch, self._line[:1], self._line[1:], call)

    def serve(self) -> None:
        call, served, (q, k, v) = self._call, self._served, self._line
        self._own = Partial(q)
        call.kernel.forward(q, k, v, served.here, call.scale, self._own)
        queries, keys, values = self._arriving.wait()
        found = Partial(queries)
        call.kernel.forward(queries, keys, values, served.rest, call.scale, found)
        self._returning = Returning((found.out, found.lse), (), self._dispatch, call)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out in the accumulation dtype ``[B, T/SP, H/TP, D]``, lse ``[B, T/SP, H/TP]``) of the local queries."""
        for rows, (out, lse) in self._returning.wait():
            self._own.merge_packed(rows, out, lse)
        out, lse = (from_line(whole, self._shape[:2], self._groups) for whole in (self._own.out, self._own.lse))
        return out, lse


class BackwardRun:
    """Gradients under way, likewise; given the global lse and delta, the shares of tasks just add up."""

    def __init__(self, dout: Tensor, saved: Saved, call: AttentionContext, dispatch: Dispatch) -> None:
        self._served, self._call, self._shape = dispatch.served(call.group.rank), call, dout.shape
        self._groups = dispatch.plan.groups
        self._dout, *self._saved = (in_line(tensor, self._groups) for tensor in (dout, *saved))
        q, k, v, out, lse = self._saved
        of_queries = (q, self._dout, lse, delta_of(self._dout, out))
        self._dispatch, self._arriving = dispatch, Arriving(dispatch, of_queries, (k, v), call)

    def serve(self) -> None:
        call, served, (q, k, v, out, lse) = self._call, self._served, self._saved
        dtype, narrow = accumulation_dtype(q.dtype), q.dtype
        self._grads = _zeros((q, k, v), dtype)
        call.kernel.backward(self._dout, q, k, v, out, lse, served.here, call.scale, self._grads)
        queries, upstream, sums, delta, keys, values = self._arriving.wait()
        shares = _zeros((queries, keys, values), dtype)
        given = (upstream, queries, keys, values, stand_in(upstream, delta), sums)
        call.kernel.backward(*given, served.rest, call.scale, shares)
        self._of_queries = Returning(shares[:1], (), self._dispatch, call, narrow)
        self._of_keys = Returning((), shares[1:], self._dispatch, call, narrow)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the local tokens in the accumulation dtype."""
        dq, dk, dv = self._grads
        for returning, wholes in ((self._of_queries, (dq,)), (self._of_keys, (dk, dv))):
            for rows, parts in returning.wait():
                for whole, part in zip(wholes, parts, strict=True):
                    rows.add_to(whole, part)
        dq, dk, dv = (from_line(whole, self._shape[:2], self._groups) for whole in self._grads)
        return dq, dk, dv


def _zeros(like: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros_like(tensor, dtype=dtype) for tensor in like)
    return q, k, v


def planned_by(planner: str) -> tuple[Forward, Backward]:
    """Both passes of attention whose tasks ``planner`` assigns."""

    def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionContext) -> tuple[Tensor, Tensor]:
        run = ForwardRun(q, k, v, call, dispatches_of(call, planner, q, k)[0])
        run.serve()
        return run.finish()

    def backward(dout: Tensor, saved: Saved, call: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        run = BackwardRun(dout, saved, call, dispatches_of(call, planner, *saved[:2])[1])
        run.serve()
        return run.finish()

    return forward, backward


def in_line(tensor: Tensor, groups: int = 1) -> Tensor:
    """``[B, T/SP, H/TP, ...]`` as one line of tokens for each of G heads groups, one behind the other, ``[1, G * B *
    T/SP, H/TP/G, ...]``: a task may be of any batch row and group."""
    if tensor.shape[2] % groups:
        raise ConfigError(
            f"a plan of {groups} heads groups cannot be served with {tensor.shape[2]} heads of a rank; it must "
            f"divide those, such as {math.gcd(groups, tensor.shape[2])}"
        )
    return tensor.flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1).unsqueeze(0)


def from_line(line: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Back; ``shape``: (B, T/SP)."""
    return line[0].unflatten(0, (groups, shape.numel())).transpose(0, 1).flatten(1, 2).unflatten(0, shape)


class Arriving:
    """Tokens on their way to those who serve them: what belongs to queries, and keys and values."""

    def __init__(self, dispatch: Dispatch, of_queries: Block, of_keys: Block, call: AttentionContext) -> None:
        self._me = call.group.rank
        served = dispatch.served(self._me)
        self._parts = [(served.queries, part) for part in of_queries] + [(served.keys, part) for part in of_keys]
        sends, receives = [], []
        for other in call.group.others:
            for crossing, part in self._parts:
                sends.append((other, crossing.rows[other].take(part).contiguous()))
                receives.append((other, part.new_empty(1, crossing.places.counts[other], *part.shape[2:])))
        bundle = Bundle(_widths(of_queries), _widths(of_keys))
        self._pending = _started(call.group, dispatch.routes(bundle), sends, receives)

    def wait(self) -> list[Tensor]:
        """Buffers in order of heads group, document and position, ``[1, rows, H/TP/G, ...]``: those of queries, then of
        keys."""
        arrived, number = self._pending.wait(), len(self._parts)
        by_home = [arrived[first : first + number] for first in range(0, len(arrived), number)]
        by_home.insert(self._me, [crossing.rows[self._me].take(part) for crossing, part in self._parts])
        whole = zip(zip(*by_home, strict=True), self._parts, strict=True)
        return [_in_order(list(parts), crossing.places) for parts, (crossing, _) in whole]


def _in_order(parts: list[Tensor], places: Places) -> Tensor:
    """What came from each home, in one buffer."""
    whole = parts[0].new_empty(1, len(places.positions), *parts[0].shape[2:])
    for home, part in enumerate(parts):
        places.put(home, part, whole)
    return whole


def _picked(places: Places, home: int, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a buffer that belong to one home, in this dtype."""
    part = whole.new_empty(1, places.counts[home], *whole.shape[2:], dtype=dtype)
    places.pick(home, whole, part)
    return part


def _widths(block: Block, dtypes: Sequence[torch.dtype] = ()) -> tuple[int, ...]:
    """Bytes of a row of each tensor, in these dtypes or its own."""
    return tuple(
        math.prod(part.shape[2:]) * dtype.itemsize
        for part, dtype in zip(block, dtypes or [part.dtype for part in block], strict=True)
    )


def _started(group: Group, routed: Routes | None, sends: list[Message], receives: list[Message]) -> Pending | Relay:
    return exchange(group, sends, receives) if routed is None else Relay(group, sends, receives, routed.of(group.rank))


class Returning:
    """What was computed for tokens, queries or keys, on its way to their homes.

    ``of_queries`` or ``of_keys``: by place in the server's buffer, the other empty. ``narrow``: the dtype in which
    ``attention.grad_dtype=compute`` sends shares of gradients.
    """

    def __init__(
        self,
        of_queries: Block,
        of_keys: Block,
        dispatch: Dispatch,
        call: AttentionContext,
        narrow: torch.dtype | None = None,
    ) -> None:
        self._me, block = call.group.rank, of_queries or of_keys
        served = dispatch.served(self._me)
        crossing = served.queries if of_queries else served.keys
        asked, places = crossing.rows, crossing.places
        self._asked, self._number = asked, len(block)
        self._own = tuple(_picked(places, self._me, part, part.dtype) for part in block)
        dtypes = [narrow if narrow and call.options.grad_dtype == "compute" else part.dtype for part in block]
        sends, receives = [], []
        for other in call.group.others:
            for part, dtype in zip(block, dtypes, strict=True):
                sends.append((other, _picked(places, other, part, dtype)))
                receives.append((other, part.new_empty(1, len(asked[other]), *part.shape[2:], dtype=dtype)))
        widths = _widths(block, dtypes)
        bundle = Bundle(widths, (), home=True) if of_queries else Bundle((), widths, home=True)
        self._pending = _started(call.group, dispatch.routes(bundle), sends, receives)

    def wait(self) -> Iterator[tuple[Rows, Block]]:
        """In the order of ranks, so that sums do not depend on who came first."""
        arrived = self._pending.wait()
        blocks = [arrived[first : first + self._number] for first in range(0, len(arrived), self._number)]
        blocks.insert(self._me, list(self._own))
        for rows, block in zip(self._asked, blocks, strict=True):
            yield rows, tuple(block)


def bundles_of(dispatch: Dispatch, sizes: Sizes) -> tuple[list[Bundle], list[Bundle]]:
    """What the exchanges of the forward and of the backward pass move."""
    one = of_a_row(sizes, dispatch)
    compute = sizes.options.grad_dtype == "compute"
    dq, dk = (one.queries, one.keys) if compute else (one.query_gradients, one.key_gradients)
    forward = [Bundle((one.queries,), (one.keys,) * 2), Bundle((one.query_gradients, one.lse), (), home=True)]
    upstream = Bundle((one.queries,) * 2 + (one.lse,) * 2, (one.keys,) * 2)
    return forward, [upstream, Bundle((dq,), (), home=True), Bundle((), (dk,) * 2, home=True)]


def of_a_row(sizes: Sizes, dispatch: Dispatch) -> Sizes:
    """Rows of the line are those of all sequences of the batch, each of one heads group."""
    groups = dispatch.plan.groups
    return replace(sizes, batch=1, heads=sizes.heads // groups, kv_heads=sizes.kv_heads // groups)


def work(planner: str, plan: SequencePlan, rank: int, inner: int) -> float:
    """Of the forward pass as it was planned first; if it was not, for heads of the planner's default widths."""
    made = [there for (name, _), (there, _) in _dispatches.get(plan, {}).items() if name == planner]
    return (made[0] if made else dispatches(plan, planner, AttentionShape())[0]).cells(rank)


# The strategy's name -> who plans for it.
PLANNERS = {"disaggregated": "cad", "zeppelin": "zeppelin"}


def _strategy(name: str, ping_pong: bool = False) -> Strategy:
    planner = PLANNERS[name]
    return Strategy(
        name,
        define_operator(name, *planned_by(planner)),
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
