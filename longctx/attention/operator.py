"""A strategy as a pair of torch custom operators.

An ``autograd.Function`` would hide attention from selective recompute and break ``torch.compile``'s graph.
As operators, the forward can be marked MUST_SAVE, so that recompute keeps (out, lse) and attention neither
runs nor communicates twice, and the compiler sees one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.attention.contract import LocalKernel, kernel_for
from longctx.attention.partial import accumulation_dtype
from longctx.comm import Group, group_named
from longctx.errors import ConfigError
from longctx.sequence import SequencePlan, plan_of


class Forward(Protocol):
    """q, k, v ``[B, T/SP, H/TP, D]`` to (out in the accumulation dtype, lse ``[B, T/SP, H/TP]``)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: SequencePlan,
        group: Group,
        kernel: LocalKernel,
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    """Upstream gradient and what the forward saved to (dq, dk, dv) in the accumulation dtype."""

    def __call__(
        self,
        dout: Tensor,
        saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        plan: SequencePlan,
        group: Group,
        kernel: LocalKernel,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Operator(Protocol):
    """The registered forward operator; ``group`` and ``kernel`` are names, ``plan`` a handle."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, kernel: str, scale: float
    ) -> tuple[Tensor, Tensor]: ...


# What runs behind each operator, for tools that look inside (a dispatch mode sees an operator as one call).
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}

_CONTEXT = "Tensor plan, str group, str kernel, float scale"


def define_operator(name: str, forward: Forward, backward: Backward) -> Operator:
    """Registers ``longctx::<name>`` and ``longctx::<name>_backward`` and joins them by autograd."""

    def run_forward(
        q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, kernel: str, scale: float
    ) -> tuple[Tensor, Tensor]:
        sequence, ranks = plan_of(plan), group_named(group)
        if (sequence.world, sequence.shard, len(sequence.documents)) != (ranks.size, q.shape[1], q.shape[0]):
            raise ConfigError(
                f"q {tuple(q.shape)} on {ranks.size} ranks does not fit its sequence plan, which is for "
                f"[{len(sequence.documents)}, {sequence.shard}, H, D] on {sequence.world} ranks"
            )
        out, lse = forward(q, k, v, sequence, ranks, kernel_for(kernel, q, k), scale)
        return out.to(q.dtype), lse

    def run_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: Tensor,
        group: str,
        kernel: str,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved = (q, k, v, out, lse)
        dq, dk, dv = backward(dout, saved, plan_of(plan), group_named(group), kernel_for(kernel, q, k), scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    forward_op = torch.library.custom_op(
        f"longctx::{name}",
        run_forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_CONTEXT}) -> (Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        f"longctx::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_CONTEXT})"
        " -> (Tensor, Tensor, Tensor)",
    )

    @forward_op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))

    @backward_op.register_fake
    def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *context: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, plan, ctx.group, ctx.kernel, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, plan)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, _dlse: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 7
        q, k, v, out, lse, plan = ctx.saved_tensors
        grads = backward_op(dout, q, k, v, out, lse, plan, ctx.group, ctx.kernel, ctx.scale)
        return (*grads, None, None, None, None)

    forward_op.register_autograd(differentiate, setup_context=remember)
    IMPLEMENTATIONS[forward_op._opoverload] = run_forward
    IMPLEMENTATIONS[backward_op._opoverload] = run_backward
    return forward_op
