"""Ping-pong of disaggregated attention: three operators, so that two nano-batches take turns to exchange and compute.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025), section on
ping-pong. The exchange of one nano-batch hides behind the computing of the other.

    start 0   start 1   serve 0   serve 1   finish 0   post 0   finish 1   post 1
    send      send      attend    attend    merge               merge
    q, k, v   q, k, v   send out  send out

Each is an autograd node of its own, and the backward pass comes to them in the opposite order. The backward of
``finish`` sends dout, that of ``serve`` computes gradients, and that of ``start`` awaits them. A handle names the run
in all of them (``longctx.sequence.handles``). What joins the nodes is an empty tensor on the device of q, and its
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from longctx.attention.runtime.borders import HANDLE, dense, require_gradient, require_plain
from longctx.attention.runtime.operator import (
    CONTEXT,
    QKV,
    admitted,
    encoded,
    out_and_lse,
)
from longctx.attention.strategies.disaggregated.execute import PLANNERS, BackwardRun, ForwardRun
from longctx.attention.strategies.disaggregated.prepared import dispatches_of
from longctx.comm import Group
from longctx.operators import Gradient, define_operator
from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence.handles import begin, end, new_handle, running


@dataclass(frozen=True)
class NanoBatch:
    """Holds one nano-batch between the steps. ``link``: what the step before returned."""

    run: Tensor
    link: Tensor
    tensors: tuple[Tensor, Tensor, Tensor]
    plan: Tensor


class PingPongAttention:
    """Computes disaggregated attention with a step between ``start`` and ``finish``."""

    def __init__(self, group: Group, kernel: str = "auto", options: StrategyOptions = DEFAULT) -> None:
        self._group, self._kernel, self._options = group.name, kernel, encoded(options)

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> NanoBatch:
        """Sends q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to the ranks that compute for them."""
        require_plain((("q", q), ("k", k), ("v", v), (HANDLE, plan)))
        run = new_handle()
        return NanoBatch(run, _start(q, k, v, run, plan, *self._context(q)), (q, k, v), plan)

    def serve(self, nano_batch: NanoBatch) -> NanoBatch:
        """Computes for the tokens that have arrived, and sends the results to their owners."""
        return replace(nano_batch, link=_serve(nano_batch.link, nano_batch.run))

    def finish(self, nano_batch: NanoBatch) -> Tensor:
        """Returns attention of the local queries, ``[B, T/SP, H/TP, D]``."""
        q, k, v = nano_batch.tensors
        out: Tensor = _finish(nano_batch.link, q, k, v, nano_batch.run, nano_batch.plan, *self._context(q))[0]
        return out

    def _context(self, q: Tensor) -> tuple[Any, ...]:
        return (self._group, self._kernel, q.shape[-1] ** -0.5, self._options)


def run_start(q: Tensor, k: Tensor, v: Tensor, run: Tensor, *names: Any) -> Tensor:
    q, k, v, context = admitted(q, k, v, *names)
    there, _ = dispatches_of(context, PLANNERS["disaggregated"], q, k)
    begin(run, ForwardRun(q, k, v, context, there))
    return q.new_empty(0)


def run_serve(link: Tensor, run: Tensor) -> Tensor:
    running(run).serve()
    return link.new_empty(0)


def run_finish(link: Tensor, q: Tensor, k: Tensor, v: Tensor, run: Tensor, *names: Any) -> tuple[Tensor, Tensor]:
    out, lse = end(run).finish()
    return out.to(q.dtype), lse


def run_finish_backward(dout: Tensor, link: Tensor, *given: Any) -> Tensor:
    q, k, v, out, lse, run, *names = given
    require_gradient(dout, out)
    q, k, v, context = admitted(q, k, v, *names)
    _, back = dispatches_of(context, PLANNERS["disaggregated"], q, k)
    begin(run, BackwardRun(dense(dout), (q, k, v, out, lse), context, back))
    return link.new_empty(0)


def run_start_backward(
    dlink: Tensor, q: Tensor, k: Tensor, v: Tensor, run: Tensor, *names: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = end(run).finish()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _empty(like: Tensor, *_: Any) -> Tensor:
    return like.new_empty(0)


_start = define_operator(
    "ping_pong_start",
    f"({QKV}, Tensor run, {CONTEXT}) -> (Tensor link)",
    run_start,
    _empty,
    Gradient(run_start_backward, saves=("q", "k", "v")),
)
_serve = define_operator(
    "ping_pong_serve",
    "(Tensor link, Tensor run) -> (Tensor served)",
    run_serve,
    _empty,
    Gradient(run_serve, saves=(), shapes=_empty),
)
_finish = define_operator(
    "ping_pong_finish",
    f"(Tensor link, {QKV}, Tensor run, {CONTEXT}) -> (Tensor out, Tensor lse)",
    run_finish,
    lambda _, *given: out_and_lse(*given),
    Gradient(run_finish_backward, of=("link",)),
)
