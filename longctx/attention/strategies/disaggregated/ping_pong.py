"""Disaggregated attention in three operators, so that two nano-batches may take turns between exchanging and computing.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025), section on
ping-pong: the exchange of one nano-batch hides behind the computing of the other.

    start 0   start 1   serve 0   serve 1   finish 0   post 0   finish 1   post 1
    q, k, v   q, k, v   attend    attend    merge               merge
    leave     leave     o leaves  o leaves

Each is an autograd node of its own, and the backward pass comes to them in the opposite order: dout leaves in that of
``finish``, gradients are computed in that of ``serve``, and awaited in that of ``start``. What joins them is a ticket,
a tensor whose length names the run: the host reads a length without waiting for the device, and a gradient has the
length of its tensor.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longctx.attention.runtime.operator import (
    CONTEXT,
    CONTEXT_SIZE,
    call_of,
    encoded,
    register,
    require_fit,
)
from longctx.attention.strategies.disaggregated.execute import PLANNERS, BackwardRun, ForwardRun, dispatches_of
from longctx.comm import Group
from longctx.options import DEFAULT, StrategyOptions

TICKETS = 1 << 10  # lengths that are given out in turn: many more than runs are under way at a time

_numbers = itertools.count()
_forward_runs: dict[int, ForwardRun] = {}
_backward_runs: dict[int, BackwardRun] = {}


@dataclass(frozen=True)
class Underway:
    """One nano-batch between the steps."""

    ticket: Tensor
    tensors: tuple[Tensor, Tensor, Tensor]
    plan: Tensor


class PingPongAttention:
    """``StrategyAttention`` of the disaggregated strategy with a step between ``start`` and ``finish``."""

    def __init__(self, group: Group, kernel: str = "auto", options: StrategyOptions = DEFAULT) -> None:
        self._group, self._kernel, self._options = group.name, kernel, encoded(options)

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Underway:
        """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` leave for those who serve them."""
        return Underway(_start(q, k, v, plan, *self._context(q)), (q, k, v), plan)

    def serve(self, run: Underway) -> Underway:
        """Attends to what has come, and sends the results home."""
        return Underway(_serve(run.ticket), run.tensors, run.plan)

    def finish(self, run: Underway) -> Tensor:
        """Attention of the local queries, ``[B, T/SP, H/TP, D]``."""
        out: Tensor = _finish(run.ticket, *run.tensors, run.plan, *self._context(run.tensors[0]))[0]
        return out

    def _context(self, q: Tensor) -> tuple[Any, ...]:
        return (self._group, self._kernel, q.shape[-1] ** -0.5, self._options)


def ticket_of(number: int, like: Tensor) -> Tensor:
    """Of no memory, however long."""
    return like.new_zeros(1).expand(number)


def run_start(q: Tensor, k: Tensor, v: Tensor, *context: Any) -> Tensor:
    call = call_of(q, k, *context)
    require_fit(q, call.plan, call.group)
    there, _ = dispatches_of(call, PLANNERS["disaggregated"], q, k)
    number = next(_numbers) % TICKETS + 1
    assert number not in _forward_runs, f"run {number} is still under way: more than {TICKETS} are"
    _forward_runs[number] = ForwardRun(q, k, v, call, there)
    return ticket_of(number, q)


def run_serve(ticket: Tensor) -> Tensor:
    _forward_runs[len(ticket)].serve()
    return ticket_of(len(ticket), ticket)


def run_finish(ticket: Tensor, q: Tensor, k: Tensor, v: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
    out, lse = _forward_runs.pop(len(ticket)).finish()
    return out.to(q.dtype), lse


def run_finish_backward(number: int, dout: Tensor, *saved_and_context: Any) -> Tensor:
    assert number not in _backward_runs, f"run {number} is still under way: more than {TICKETS} are"
    q, k, v, out, lse, *context = saved_and_context
    call = call_of(q, k, *context)
    _, back = dispatches_of(call, PLANNERS["disaggregated"], q, k)
    _backward_runs[number] = BackwardRun(dout, (q, k, v, out, lse), call, back)
    return ticket_of(number, q)


def run_serve_backward(ticket: Tensor) -> Tensor:
    _backward_runs[len(ticket)].serve()
    return ticket_of(len(ticket), ticket)


def run_start_backward(ticket: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward_runs.pop(len(ticket)).finish()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_QKV = "Tensor q, Tensor k, Tensor v"
_start = register("ping_pong_start", run_start, f"({_QKV}, {CONTEXT}) -> Tensor")
_serve = register("ping_pong_serve", run_serve, "(Tensor ticket) -> Tensor")
_finish = register("ping_pong_finish", run_finish, f"(Tensor ticket, {_QKV}, {CONTEXT}) -> (Tensor, Tensor)")
_finish_backward = register(
    "ping_pong_finish_backward",
    run_finish_backward,
    f"(int number, Tensor dout, {_QKV}, Tensor out, Tensor lse, {CONTEXT}) -> Tensor",
)
_serve_backward = register("ping_pong_serve_backward", run_serve_backward, "(Tensor ticket) -> Tensor")
_start_backward = register(
    "ping_pong_start_backward", run_start_backward, f"(Tensor ticket, {_QKV}) -> (Tensor, Tensor, Tensor)"
)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_start(ctx: Any, dticket: Tensor) -> tuple[Tensor | None, ...]:
    return (*_start_backward(dticket, *ctx.saved_tensors), *(None,) * CONTEXT_SIZE)


def _differentiate_serve(ctx: Any, dticket: Tensor) -> Tensor:
    out: Tensor = _serve_backward(dticket)
    return out


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ticket, q, k, v, plan, *ctx.names = inputs
    ctx.number = len(ticket)
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.mark_non_differentiable(output[1])


def _differentiate_finish(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    dticket = _finish_backward(ctx.number, dout, *ctx.saved_tensors, *ctx.names)
    return (dticket, *(None,) * (3 + CONTEXT_SIZE))


_start.register_autograd(_differentiate_start, setup_context=_keep_inputs)
_serve.register_autograd(_differentiate_serve)
_finish.register_autograd(_differentiate_finish, setup_context=_keep_all)
