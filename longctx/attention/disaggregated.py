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
assignment (``sequence.tasks``). Zeppelin (2025) is the same with another planner. A token crosses once per server,
however many of its tasks read it. Delta travels in the place of O (``longctx.attention.delta``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from longctx.attention.assignment import assigned
from longctx.attention.delta import delta_of, stand_in
from longctx.attention.operator import Backward, Call, Forward, Saved, define_operator
from longctx.attention.partial import Partial, accumulation_dtype
from longctx.attention.registry import Peak, Sizes, Strategy, Volume
from longctx.comm import exchange
from longctx.planner import Widths
from longctx.sequence import Homes, Rows, SequencePlan
from longctx.sequence.plan import Places
from longctx.sequence.tasks import Dispatch, Task

Block = tuple[Tensor, ...]  # tensors of the same tokens, [1, rows, H/TP, ...]
Dispatches = tuple[Dispatch, Dispatch]  # of the forward and of the backward pass

_dispatches: weakref.WeakKeyDictionary[SequencePlan, dict[str, Dispatches]] = weakref.WeakKeyDictionary()


def assign(
    plan: SequencePlan, forward: Sequence[Task], backward: Sequence[Task] | None = None, planner: str = "cad"
) -> None:
    """Serves the batch of this plan so, in place of what ``planner`` would say; every visible cell is in exactly one
    task of each pass."""
    homes = Homes.of(plan)
    there = Dispatch(homes, tuple(forward))
    back = there if backward is None else Dispatch(homes, tuple(backward))
    _dispatches.setdefault(plan, {})[planner] = there, back


def dispatches(plan: SequencePlan, planner: str, widths: Widths) -> Dispatches:
    """Planned at first use, for heads of these ``widths``; all ranks come to the same."""
    if planner not in _dispatches.setdefault(plan, {}):
        assign(plan, assigned(Homes.of(plan), planner, widths), planner=planner)
    return _dispatches[plan][planner]


def prepare(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> None:
    """Plans a batch before its first layer asks, and works out all that ``rank`` will ask for in both passes."""
    widths = Widths(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.element)
    for dispatch in dispatches(plan, planner, widths):
        dispatch.ready(rank)


def widths_of(q: Tensor, k: Tensor) -> Widths:
    return Widths(q.shape[2], k.shape[2], q.shape[3], q.element_size())


class ForwardRun:
    """Attention of the local queries under way: posted when made, computed by ``serve``, complete after ``finish``."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, dispatch: Dispatch) -> None:
        self._dispatch, self._call = dispatch, call
        self._served, self._shape = self._dispatch.served(call.group.rank), q.shape
        self._line = in_line(q), in_line(k), in_line(v)
        self._arriving = Arriving(self._dispatch, self._line[:1], self._line[1:], call)

    def serve(self) -> None:
        call, served = self._call, self._served
        self._own = Partial(self._line[0])
        call.kernel.forward(*self._line, served.here, call.scale, self._own)
        queries, keys, values = self._arriving.wait()
        found = Partial(queries)
        call.kernel.forward(queries, keys, values, served.rest, call.scale, found)
        ranks, me = range(call.group.size), call.group.rank
        asked = [self._dispatch.served(server).queries[me] for server in ranks]
        self._returning = Returning((found.out, found.lse), served.query_places, asked, call)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out in the accumulation dtype ``[B, T/SP, H/TP, D]``, lse ``[B, T/SP, H/TP]``) of the local queries."""
        for rows, (out, lse) in self._returning.wait():
            self._own.merge_packed(rows, out, lse)
        return self._own.out.view(self._shape), self._own.lse.view(self._shape[:3])


class BackwardRun:
    """Gradients under way, likewise; given the global lse and delta, the shares of tasks just add up."""

    def __init__(self, dout: Tensor, saved: Saved, call: Call, dispatch: Dispatch) -> None:
        self._dispatch, self._call = dispatch, call
        self._served, self._shapes = self._dispatch.served(call.group.rank), [tensor.shape for tensor in saved[:3]]
        self._saved, self._dout = [in_line(tensor) for tensor in saved], in_line(dout)
        q, k, v, out, lse = self._saved
        of_queries = (q, self._dout, lse, delta_of(self._dout, out))
        self._arriving = Arriving(self._dispatch, of_queries, (k, v), call)

    def serve(self) -> None:
        call, served, (q, k, v, out, lse) = self._call, self._served, self._saved
        dtype, narrow, me = accumulation_dtype(q.dtype), q.dtype, call.group.rank
        self._grads = dq, dk, dv = _zeros((q, k, v), dtype)
        call.kernel.backward(self._dout, q, k, v, out, lse, served.here, call.scale, (dq, dk, dv))
        queries, upstream, sums, delta, keys, values = self._arriving.wait()
        shares = _zeros((queries, keys, values), dtype)
        given = (upstream, queries, keys, values, stand_in(upstream, delta), sums)
        call.kernel.backward(*given, served.rest, call.scale, shares)
        asked = [self._dispatch.served(server) for server in range(call.group.size)]
        self._of_queries = Returning(shares[:1], served.query_places, [one.queries[me] for one in asked], call, narrow)
        self._of_keys = Returning(shares[1:], served.key_places, [one.keys[me] for one in asked], call, narrow)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the local tokens in the accumulation dtype."""
        dq, dk, dv = self._grads
        for returning, wholes in ((self._of_queries, (dq,)), (self._of_keys, (dk, dv))):
            for rows, parts in returning.wait():
                for whole, part in zip(wholes, parts, strict=True):
                    rows.add_to(whole, part)
        return dq.view(self._shapes[0]), dk.view(self._shapes[1]), dv.view(self._shapes[2])


def _zeros(like: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros_like(tensor, dtype=dtype) for tensor in like)
    return q, k, v


def planned_by(planner: str) -> tuple[Forward, Backward]:
    """Both passes of attention whose tasks ``planner`` assigns."""

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        run = ForwardRun(q, k, v, call, dispatches(call.plan, planner, widths_of(q, k))[0])
        run.serve()
        return run.finish()

    def backward(dout: Tensor, saved: Saved, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        run = BackwardRun(dout, saved, call, dispatches(call.plan, planner, widths_of(*saved[:2]))[1])
        run.serve()
        return run.finish()

    return forward, backward


def in_line(tensor: Tensor) -> Tensor:
    """``[B, T/SP, ...]`` as one line of tokens, ``[1, B * T/SP, ...]``: a task may be of any batch row."""
    return tensor.flatten(0, 1).unsqueeze(0)


class Arriving:
    """Tokens on their way to those who serve them: what belongs to queries, and keys and values."""

    def __init__(self, dispatch: Dispatch, of_queries: Block, of_keys: Block, call: Call) -> None:
        self._blocks = (of_queries, of_keys)
        self._me = call.group.rank
        self._served = dispatch.served(self._me)
        sends, receives = [], []
        for other in call.group.others:
            theirs = dispatch.served(other)
            for block, leaving, coming in (
                (of_queries, theirs.queries[self._me], self._served.queries[other]),
                (of_keys, theirs.keys[self._me], self._served.keys[other]),
            ):
                sends += [(other, leaving.take(part).contiguous()) for part in block]
                receives += [(other, part.new_empty(1, len(coming), *part.shape[2:])) for part in block]
        self._pending = exchange(call.group, sends, receives)

    def wait(self) -> list[Tensor]:
        """Buffers in order of (batch row, position), ``[1, rows, H/TP, ...]``: those of queries, then of keys."""
        arrived, served, me = self._pending.wait(), self._served, self._me
        (of_queries, of_keys), number = self._blocks, len(self._blocks[0]) + len(self._blocks[1])
        by_home = [arrived[first : first + number] for first in range(0, len(arrived), number)]
        own = [served.queries[me].take(part) for part in of_queries] + [served.keys[me].take(part) for part in of_keys]
        by_home.insert(me, own)
        places = [served.query_places] * len(of_queries) + [served.key_places] * len(of_keys)
        return [_in_order(list(parts), where) for parts, where in zip(zip(*by_home, strict=True), places, strict=True)]


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


class Returning:
    """What was computed for tokens on its way to their homes.

    ``block``: by place in the server's buffer. ``asked[server]``: rows of this rank's line that the server had.
    ``narrow``: the dtype in which ``attention.travel=narrow`` sends shares of gradients.
    """

    def __init__(
        self, block: Block, places: Places, asked: list[Rows], call: Call, narrow: torch.dtype | None = None
    ) -> None:
        self._me, self._asked, self._number = call.group.rank, asked, len(block)
        self._own = [_picked(places, self._me, part, part.dtype) for part in block]
        dtypes = [narrow if narrow and call.options.travel == "narrow" else part.dtype for part in block]
        sends, receives = [], []
        for other in call.group.others:
            for part, dtype in zip(block, dtypes, strict=True):
                sends.append((other, _picked(places, other, part, dtype)))
                receives.append((other, part.new_empty(1, len(asked[other]), *part.shape[2:], dtype=dtype)))
        self._pending = exchange(call.group, sends, receives)

    def wait(self) -> Iterator[tuple[Rows, Block]]:
        """In the order of ranks, so that sums do not depend on who came first."""
        arrived = self._pending.wait()
        blocks = [arrived[first : first + self._number] for first in range(0, len(arrived), self._number)]
        blocks.insert(self._me, self._own)
        for rows, block in zip(self._asked, blocks, strict=True):
            yield rows, tuple(block)


def volume(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Rows to servers and results home; a pass sends what its own dispatch says."""
    widths = Widths(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.element)
    there, back = (volume_of(dispatch, rank, sizes) for dispatch in dispatches(plan, planner, widths))
    return Volume(there.forward, back.backward, there.messages_forward, back.messages_backward)


def volume_of(dispatch: Dispatch, rank: int, sizes: Sizes) -> Volume:
    """What a rank sends under ``dispatch``, should it be that of the forward and of the backward pass."""
    one = replace(sizes, batch=1)  # rows of the line are those of all sequences of the batch
    sent = rows_sent(dispatch, rank)
    narrow = sizes.options.travel == "narrow"
    dq, dk = (one.queries, one.keys) if narrow else (one.query_gradients, one.key_gradients)
    return Volume(
        sent.queries * one.queries + sent.keys * 2 * one.keys + sent.asked * (one.query_gradients + one.lse),
        sent.queries * 2 * (one.queries + one.lse) + sent.keys * 2 * one.keys + sent.asked * dq + sent.read * 2 * dk,
        sent.servers + 2 * sent.key_servers + 2 * sent.homes,
        4 * sent.servers + 2 * sent.key_servers + sent.homes + 2 * sent.key_homes,
    )


def peak(planner: str, plan: SequencePlan, sizes: Sizes) -> Peak:
    """At most: everything that a pass makes, as if nothing were freed before its end, on the rank with most of it."""
    found = [_alive(planner, plan, rank, sizes) for rank in range(plan.world)]
    return Peak(max(forward for forward, _ in found), max(backward for _, backward in found))


def _alive(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> tuple[int, int]:
    one, own = replace(sizes, batch=1), plan.shard * len(plan.documents)
    widths = Widths(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.element)
    there, back = dispatches(plan, planner, widths)
    sent, served = rows_sent(there, rank), there.served(rank)
    queries, keys = len(served.query_places.positions), len(served.key_places.positions)
    # Sent, received, in order, computed; then what goes home and what comes from there.
    forward = (sent.queries + 2 * queries) * one.held(queries=1) + (sent.keys + 2 * keys) * one.held(keys=1)
    forward += (2 * queries + sent.queries) * one.held(outputs=1, sums=1) + own * one.held(1, outputs=1, sums=1)
    sent, served = rows_sent(back, rank), back.served(rank)
    queries, keys = len(served.query_places.positions), len(served.key_places.positions)
    backward = (sent.queries + 2 * queries) * one.held(queries=2, sums=2) + (sent.keys + 2 * keys) * one.held(keys=1)
    backward += (2 * queries + sent.queries) * one.held(outputs=1) + (2 * keys + sent.keys) * one.held(gradients=1)
    # Stand-ins of outputs and what they are made of; delta, and the gradients of this rank.
    backward += queries * one.held(1, outputs=3, sums=3) + own * one.held(3, outputs=3, sums=2, keys=1, gradients=1)
    return forward, backward


def work(planner: str, plan: SequencePlan, rank: int, inner: int) -> float:
    """Of the forward pass; of a batch that has not been planned, for heads of the planner's default widths."""
    return dispatches(plan, planner, Widths())[0].served(rank).cells


@dataclass(frozen=True)
class RowsSent:
    """Of one rank in one pass: rows of its own that others serve (``queries``) or read (``keys``), and of others that
    it serves (``asked``) or reads (``read``); and how many ranks each of them goes to."""

    queries: int
    keys: int
    asked: int
    read: int
    servers: int
    key_servers: int
    homes: int
    key_homes: int


def rows_sent(dispatch: Dispatch, rank: int) -> RowsSent:
    ranks = [other for other in range(dispatch.world) if other != rank]
    away = [dispatch.served(other) for other in ranks]
    mine = dispatch.served(rank)
    counts = [
        [len(one.queries[rank]) for one in away],
        [len(one.keys[rank]) for one in away],
        [len(mine.queries[other]) for other in ranks],
        [len(mine.keys[other]) for other in ranks],
    ]
    return RowsSent(*map(sum, counts), *(sum(map(bool, count)) for count in counts))


# The strategy's name -> who plans for it.
PLANNERS = {"disaggregated": "cad", "zeppelin": "zeppelin"}

STRATEGIES = {
    name: Strategy(
        name,
        define_operator(name, *planned_by(planner)),
        "contiguous",
        lambda case: None,
        partial(volume, planner),
        partial(peak, planner),
        frozenset({"travel"}),
        work=partial(work, planner),
        prepare=partial(prepare, planner),
    )
    for name, planner in PLANNERS.items()
}
