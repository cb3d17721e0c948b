"""Strategies as torch operators (``longctx.operators``): their arguments, and the context that a strategy is given.

What is no tensor an operator takes by name: the plan by its handle, the group and the kernel by theirs. Options come
as one string, so that a new option changes no schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.attention.runtime.borders import dense, require_gradient, require_operands
from longctx.attention.runtime.local_kernel import LocalKernel, kernel_for
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.comm import Group, group_named
from longctx.errors import ConfigError
from longctx.operators import Gradient, define_operator
from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence import SequencePlan, plan_of
from longctx.sequence.plan import named_by


@dataclass(frozen=True)
class AttentionContext:
    """Holds all that a strategy is given besides its tensors.

    ``named``: what the operator's handle names. It is the plan, or an object that has it as ``plan`` and knows more.
    """

    plan: SequencePlan
    group: Group
    kernel: LocalKernel
    scale: float
    options: StrategyOptions
    named: object


class Forward(Protocol):
    """Computes (out, lse) of the local queries from the local q, k, v.

    All are ``[B, T/SP, H/TP, D]``, k and v with fewer heads; out in the accumulation dtype, lse ``[B, T/SP, H/TP]``.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]: ...


Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, out (in the dtype of q), lse


class Backward(Protocol):
    """Computes (dq, dk, dv), in the accumulation dtype, from dout and what the forward saved."""

    def __call__(self, dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]: ...


class Attend(Protocol):
    """Computes (out, lse) of the local queries, by one registered operator or by several in a row.

    ``plan`` is a handle, ``group`` a name. ``names``: the kernel's, the scale, and the options as ``encoded``. The
    strategy decides of which queries the lse is: they may be others than those of out.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, group: str, *names: Any
    ) -> tuple[Tensor, Tensor]: ...


# Of a strategy's operator: what completes its (out, lse), of which only the tail was kept (``tail_of``).
COMPLETIONS: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {}

QKV = "Tensor q, Tensor k, Tensor v"
CONTEXT = 'Tensor plan, str group, str kernel, float scale, str options=""'


@lru_cache(maxsize=64)
def encoded(options: StrategyOptions) -> str:
    """Returns the options as an operator takes them: JSON of those that the user chose, or nothing."""
    chosen = {one.name: getattr(options, one.name) for one in fields(options)}
    default = asdict(DEFAULT)
    found = {name: value for name, value in chosen.items() if value != default[name]}
    return json.dumps(found, sort_keys=True, default=index) if found else ""


@lru_cache(maxsize=64)
def decoded(options: str) -> StrategyOptions:
    """Returns the options that ``encoded`` made a string of."""
    return StrategyOptions(**json.loads(options)) if options else DEFAULT


def define_strategy(
    name: str, forward: Forward, backward: Backward, tail: bool = False, fits: Callable[..., None] | None = None
) -> Attend:
    """Registers a strategy's two passes: ``longctx::<name>`` and ``longctx::<name>_backward``.

    ``tail``: registers ``longctx::<name>_completion`` as well, for strategies whose ``forward`` takes fewer queries
    than keys. These are the first of the local ones, under a plan of them (``SequencePlan.head``). ``fits``: refuses
    queries that a plan is not for; ``require_fit`` by default.
    """
    require = fits or require_fit

    def run_forward(q: Tensor, k: Tensor, v: Tensor, *names: Any) -> tuple[Tensor, Tensor]:
        q, k, v, context = admitted(q, k, v, *names, fits=require)
        out, lse = forward(q, k, v, context)
        return out.to(q.dtype), lse

    def run_backward(dout: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse, *names = given
        require_gradient(dout, out)
        q, k, v, context = admitted(q, k, v, *names, fits=require)
        dq, dk, dv = backward(dense(dout), (q, k, v, out, lse), context)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    schema = f"({QKV}, {CONTEXT}) -> (Tensor out, Tensor lse)"
    operator: Attend = define_operator(name, schema, run_forward, out_and_lse, Gradient(run_backward))
    if tail:
        COMPLETIONS[operator] = _define_completion(name, forward)
    return operator


def out_and_lse(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Returns empty tensors like the (out, lse) of q ``[B, T/SP, H/TP, D]``."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _define_completion(name: str, forward: Forward) -> Callable[..., tuple[Tensor, Tensor]]:
    """q, k, v ``[B, T/SP, H/TP, D]`` and the kept tails of out and lse to the whole of both."""

    def complete(
        q: Tensor, k: Tensor, v: Tensor, tail_out: Tensor, tail_lse: Tensor, *names: Any
    ) -> tuple[Tensor, Tensor]:
        q, k, v, context = admitted(q, k, v, *names)
        head = q[:, : context.plan.head.queries(context.group.rank)]
        out, lse = forward(head, k, v, replace(context, plan=context.plan.head))
        return torch.cat((out.to(q.dtype), tail_out), dim=1), torch.cat((lse, tail_lse), dim=1)

    schema = f"({QKV}, Tensor tail_out, Tensor tail_lse, {CONTEXT}) -> (Tensor out, Tensor lse)"
    completion: Callable[..., tuple[Tensor, Tensor]] = define_operator(
        f"{name}_completion", schema, complete, out_and_lse
    )
    return completion


def tail_of(out: Tensor, lse: Tensor, plan: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Returns copies of the rows that ``SequencePlan.head`` leaves.

    They are the later half of the local queries, and padding.
    """
    first = plan_of(plan).head.queries(group_named(group).rank)
    return out[:, first:].clone(), lse[:, first:].clone()


def require_fit(q: Tensor, plan: SequencePlan, group: Group) -> None:
    """Refuses local queries ``[B, T/SP, H, D]`` of another batch, length or number of ranks than the plan's."""
    if (plan.world, plan.shard, len(plan.documents)) != (group.size, q.shape[1], q.shape[0]):
        raise ConfigError(
            f"q {tuple(q.shape)} on {group.size} ranks does not fit its sequence plan, which is for "
            f"[{len(plan.documents)}, {plan.shard}, H, D] on {plan.world} ranks"
        )


def require_rows(q: Tensor, plan: SequencePlan, group: Group) -> None:
    """Refuses local queries that a plan is not for, where several sequence groups make the group of ranks."""
    if group.size % plan.world or (plan.shard, len(plan.documents)) != (q.shape[1], q.shape[0]):
        raise ConfigError(
            f"q {tuple(q.shape)} on {group.size} ranks does not fit its sequence plan, which is for "
            f"[{len(plan.documents)}, {plan.shard}, H, D] on a part of them of {plan.world}"
        )


def admitted(
    q: Tensor, k: Tensor, v: Tensor, *names: Any, fits: Callable[..., None] = require_fit
) -> tuple[Tensor, Tensor, Tensor, AttentionContext]:
    """Returns q, k, v as kernels read them, and the context; refuses what is wrong by itself or for its plan."""
    require_operands(q, k, v)
    context = context_of(q, k, *names)
    fits(q, context.plan, context.group)
    return dense(q), dense(k), dense(v), context


def context_of(
    q: Tensor, k: Tensor, plan: Tensor, group: str, kernel: str, scale: float, options: str = ""
) -> AttentionContext:
    """Returns the context that an operator's arguments name, for q and k that ``require_operands`` has seen."""
    found = named_by(plan)
    its_plan = found if isinstance(found, SequencePlan) else found.plan
    return AttentionContext(its_plan, group_named(group), kernel_for(kernel, q, k), scale, decoded(options), found)
