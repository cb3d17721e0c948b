"""A linear layer's core as a pair of torch custom operators, for the reasons of ``attention.operator``.

The forward operator returns, beside the output, the states that entered this rank's segments. Selective recompute
keeps both, so that neither local computing nor the exchange runs twice; the backward operator computes everything else
again, in the order in which the exchange hides best, with autograd on the local parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.attention.operator import register
from longctx.attention.partial import accumulation_dtype
from longctx.comm import group_named
from longctx.errors import ConfigError
from longctx.linear import bidirectional, delta, diagonal
from longctx.linear.autograd import autograd
from longctx.linear.chunks import Chunks, chunks_of
from longctx.linear.local_scan import LocalScan, scan_chunks
from longctx.linear.registry import LinearStrategy, get_linear
from longctx.linear.states import Call, Summary
from longctx.sequence import plan_of


class Core(Protocol):
    """How one family of mixers computes its chunks; ``diagonal`` and ``delta`` are such modules."""

    def write(self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], chunks: Chunks) -> Any: ...

    def reads(self, written: Any, chunks: Chunks) -> Tensor: ...

    def intra(self, written: Any, chunks: Chunks) -> Tensor: ...


def forward(
    core: Core, tensors: Sequence[Tensor], chunks: Chunks, call: Call, strategy: LinearStrategy
) -> tuple[Tensor, Tensor]:
    """(out ``[B, T/SP, H/TP, V]``, states that entered the segments ``[B, n, H/TP, K, V]``)."""
    q, k, v, *gates = tensors
    written = core.write(q, k, v, gates, chunks)
    local = scan_chunks(written.transition, written.addition, chunks)
    arriving = strategy.enter(local.summary, call)
    reads, out = core.reads(written, chunks), core.intra(written, chunks)
    entered = arriving()
    out += reads @ local.states(entered, chunks)
    return chunks.join(out), entered


def backward(
    core: Core,
    dout: Tensor,
    tensors: Sequence[Tensor],
    entered: Tensor,
    chunks: Chunks,
    call: Call,
    strategy: LinearStrategy,
) -> list[Tensor]:
    """Gradients of the tensors."""
    with autograd():
        q, k, v, *gates = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        written = core.write(q, k, v, gates, chunks)
        local = scan_chunks(written.transition, written.addition, chunks)
        reads = core.reads(written, chunks)
    dout = chunks.cut(dout.to(entered.dtype))
    dstates = reads.detach().mT @ dout
    fixed = LocalScan(local.entering.detach(), local.leaving.detach(), local.values, local.rows)
    arriving = strategy.leave(Summary(fixed.transitions, fixed.entered_gradient(dstates, chunks)), call)
    with autograd():
        out = core.intra(written, chunks)
        dreads = dout @ fixed.states(entered, chunks).mT
        first = torch.autograd.grad((reads, out), leaves, (dreads, dout), retain_graph=True, allow_unused=True)
    ends = fixed.gradients(dstates, entered, arriving(), chunks)
    with autograd():
        second = torch.autograd.grad((local.entering, local.leaving), leaves, ends, allow_unused=True)
    return [_sum(parts, tensor) for *parts, tensor in zip(first, second, tensors, strict=True)]


def _sum(parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else torch.zeros_like(like)


_CONTEXT = "Tensor plan, str group, str strategy, int chunk"
_CONTEXT_SIZE = 4


def define_operator(name: str, core: Core) -> Any:
    """Registers ``longctx::<name>`` and ``longctx::<name>_backward`` and joins them by autograd."""

    def run_forward(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], *context: Any) -> tuple[Tensor, Tensor]:
        tensors, (chunks, call, strategy) = (q, k, v, *gates), _resolve(q, gates, *context)
        if call.plan.mask.causal:
            out, entered = forward(core, tensors, chunks, call, strategy)
        else:
            out, entered = bidirectional.forward(tensors, chunks, _parts(call, q, context), call)
        return out.to(q.dtype), entered

    def run_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], entered: Tensor, *context: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        tensors, (chunks, call, strategy) = (q, k, v, *gates), _resolve(q, gates, *context)
        if call.plan.mask.causal:
            found = backward(core, dout, tensors, entered, chunks, call, strategy)
        else:
            found = bidirectional.backward(dout, tensors, entered, chunks, _parts(call, q, context), call)
        dq, dk, dv, *dgates = (grad.to(tensor.dtype) for grad, tensor in zip(found, tensors, strict=True))
        return dq, dk, dv, dgates

    forward_op = register(
        name, run_forward, f"(Tensor q, Tensor k, Tensor v, Tensor[] gates, {_CONTEXT}) -> (Tensor, Tensor)"
    )
    backward_op = register(
        f"{name}_backward",
        run_backward,
        f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor entered, {_CONTEXT})"
        " -> (Tensor, Tensor, Tensor, Tensor[])",
    )

    @forward_op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], *context: Any) -> tuple[Tensor, Tensor]:
        segments = torch.library.get_ctx().new_dynamic_size()
        shape = (q.shape[0], segments, q.shape[2], q.shape[3], v.shape[3])
        return q.new_empty(v.shape), q.new_empty(shape, dtype=accumulation_dtype(q.dtype))

    @backward_op.register_fake
    def _(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], *context: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), [g.new_empty(g.shape) for g in gates]

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, gates, plan, *ctx.names = inputs
        ctx.save_for_backward(q, k, v, output[1], plan, *gates)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, _dentered: None) -> tuple[Any, ...]:
        q, k, v, entered, plan, *gates = ctx.saved_tensors
        if dout is None:
            return (None, None, None, [None] * len(gates), *(None,) * _CONTEXT_SIZE)
        grads = backward_op(dout, q, k, v, gates, entered, plan, *ctx.names)
        return (*grads, *(None,) * _CONTEXT_SIZE)

    forward_op.register_autograd(differentiate, setup_context=remember)
    return forward_op


def _resolve(
    q: Tensor, gates: Sequence[Tensor], plan: Tensor, group: str, strategy: str, chunk: int
) -> tuple[Chunks, Call, LinearStrategy]:
    sequence, ranks = plan_of(plan), group_named(group)
    if (sequence.world, sequence.shard, len(sequence.documents)) != (ranks.size, q.shape[1], q.shape[0]):
        raise ConfigError(
            f"q {tuple(q.shape)} on {ranks.size} ranks does not fit its sequence plan, which is for "
            f"[{len(sequence.documents)}, {sequence.shard}, H, K] on {sequence.world} ranks"
        )
    if not sequence.mask.causal and (gates or strategy != "lasp2"):
        raise ConfigError(
            f"attention.linear={strategy} with {len(gates)} gates can't let queries see later tokens; lasp2 can, for "
            "mixers without gates"
        )
    decay = None
    if not gates:
        decay = q.new_zeros(q.shape[2], dtype=accumulation_dtype(q.dtype))
    elif len(gates) == 1 and gates[0].ndim == 1:
        decay = gates[0].to(accumulation_dtype(q.dtype))
    return chunks_of(sequence, ranks.rank, chunk, q.device), Call(sequence, ranks, decay), get_linear(strategy)


def _parts(call: Call, q: Tensor, context: Sequence[Any]) -> bidirectional.Parts:
    return bidirectional.parts_of(call.plan, call.group.rank, context[-1], q.device)


diagonal_attention = define_operator("linear_diagonal", diagonal)
delta_attention = define_operator("linear_delta", delta)
