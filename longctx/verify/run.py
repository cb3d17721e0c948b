"""Runs a case on one rank, and judges what all ranks computed against the dense reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import StrategyAttention, dense_attention, get_strategy, settled
from longctx.comm import group_of
from longctx.operators import IMPLEMENTATIONS
from longctx.options import DEFAULT
from longctx.sequence import SequencePlan, unshard
from longctx.verify import linear
from longctx.verify.case import ROUNDING_FACTOR, TOLERANCE, RankResult, Verdict, VerifyCase
from longctx.verify.memory import PeakMemory


def run_rank(case: VerifyCase, group: dist.ProcessGroup | None) -> RankResult:
    """Runs forward and backward of this rank's share, with the random upstream gradient of the case."""
    ranks = group_of(group)
    plan, local, dout = local_inputs(case, ranks.rank)
    compute = core_of(case, group)
    before = ranks.traffic.bytes
    with PeakMemory(IMPLEMENTATIONS) as memory:
        out = compute(local, plan.handle)
        between = ranks.traffic.bytes
        grads = torch.autograd.grad(out, list(local.values()), dout)
    return RankResult(_named(out, local, grads), between - before, ranks.traffic.bytes - between, memory.peak)


def local_inputs(case: VerifyCase, rank: int) -> tuple[SequencePlan, dict[str, Tensor], Tensor]:
    """Returns the case's plan, a rank's inputs by name, and its upstream gradient; the inputs want gradients."""
    plan, head_tensors = case.plan(), shared_inputs(case)
    local = {
        name: whole.clone() if name in head_tensors else cut(whole, plan, rank)
        for name, whole in whole_inputs(case).items()
    }
    dout = local.pop("dout")
    for tensor in local.values():
        tensor.requires_grad_()
    return plan, local, dout


def whole_inputs(case: VerifyCase) -> dict[str, Tensor]:
    """Returns all inputs by name and the upstream gradient ``dout``, the same on every rank."""
    if case.mixer is not None:
        return linear.inputs(case)
    return dict(zip(("q", "k", "v", "dout"), case.inputs(), strict=True))


def shared_inputs(case: VerifyCase) -> frozenset[str]:
    """Returns the names of inputs that every rank holds whole; each has a share of their gradient."""
    return linear.head_tensors(case) if case.mixer is not None else frozenset()


def core_of(case: VerifyCase, group: dist.ProcessGroup | None) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """Returns a function from a rank's inputs and the plan's handle to its output.

    Ranks of the group call it at the same point.
    """
    if case.mixer is not None:
        return partial(linear.local_output, case, group)
    attention = attention_of(case, group)
    return lambda local, plan: attention(local["q"], local["k"], local["v"], plan)


def refusal_of(case: VerifyCase) -> str | None:
    """Returns why the case is not executed exactly, None if it is."""
    return case.refused() if case.mixer is None else linear.refused(case)


def _named(out: Tensor, inputs: Iterable[str], grads: Iterable[Tensor]) -> dict[str, Tensor]:
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


def attention_of(case: VerifyCase, group: dist.ProcessGroup | None) -> StrategyAttention:
    """Returns the case's strategy; ranks of the group call it at the same point."""
    options = settled(get_strategy(case.strategy), case.attention_case)
    return StrategyAttention(case.strategy, group, case.kernel, options=options)


def cut(whole: Tensor, plan: SequencePlan, rank: int) -> Tensor:
    """Returns this rank's rows of ``[B, S, ...]`` in a shard of physical length, ``[B, T/SP, ...]``; padding is 0."""
    where = torch.from_numpy(plan.positions(rank))
    local = whole.new_zeros(whole.shape[0], plan.shard, *whole.shape[2:])
    local[:, : len(where)] = whole[:, where]
    return local


def reference(case: VerifyCase) -> dict[str, Tensor]:
    """Computes the output and all gradients in float64, on the case's inputs as rounded to its dtype.

    They are those of dense attention, or of a mixer's recurrence.
    """
    whole = {name: value.double() for name, value in whole_inputs(case).items()}
    dout = whole.pop("dout")
    for tensor in whole.values():
        tensor.requires_grad_()
    if case.mixer is not None:
        out = linear.reference(case, whole)
    else:
        out = dense_attention(whole["q"], whole["k"], whole["v"], case.packing, case.mask)
    return _named(out, whole, torch.autograd.grad(out, list(whole.values()), dout))


def judge(case: VerifyCase, results: list[RankResult]) -> tuple[Verdict, dict[str, Tensor]]:
    """Returns the verdict, and for ``--dump`` the inputs and the computed tensors, whole and in natural order."""
    plan, truth, inputs = case.plan(), reference(case), whole_inputs(case)
    added = {f"d{name}" for name in shared_inputs(case)}
    whole = {}
    for name in truth:
        parts = [result.tensors[name] for result in results]
        whole[name] = torch.stack(parts).sum(0) if name in added else unshard(parts, plan)
    errors = tensor_errors(case, plan, whole, truth)
    limits = _limits(case, truth)
    padding = any(
        bool(result.tensors[name][:, len(plan.positions(rank)) :].any())
        for rank, result in enumerate(results)
        for name in truth.keys() - added
    )
    verdict = Verdict(
        strategy=case.strategy,
        layout=case.layout,
        mixer=case.mixer,
        world=case.world,
        backend=case.backend,
        dtype=case.dtype,
        refused=None,
        errors=errors,
        bytes_forward=[result.bytes_forward for result in results],
        bytes_backward=[result.bytes_backward for result in results],
        peak_extra_bytes=max(result.peak_extra_bytes for result in results),
        # A NaN compares false: it never passes.
        passed=not padding and all(errors[name] <= limits[name] for name in truth),
    )
    return verdict, {**inputs, **whole}


def refused(case: VerifyCase, reason: str) -> Verdict:
    """Returns the verdict on a case that is refused for ``reason``."""
    return Verdict(
        case.strategy, case.layout, case.mixer, case.world, case.backend, case.dtype, reason, {}, [], [], 0, False
    )


def tensor_errors(
    case: VerifyCase, plan: SequencePlan, whole: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, float]:
    """Returns each tensor's relative error: that of the worst rank, over the norm of the whole reference.

    The upstream gradient's norm times 1e-3 is added to the latter.
    """
    upstream, shared = 1e-3 * whole_inputs(case)["dout"].double().norm(), shared_inputs(case)
    errors = {}
    for name, expected in truth.items():
        difference = whole[name].double() - expected
        if name[1:] in shared:
            errors[name] = float(difference.norm() / (expected.norm() + upstream))
            continue
        by_rank = [difference[:, torch.from_numpy(plan.positions(rank))].norm() for rank in range(case.world)]
        errors[name] = float(torch.stack(by_rank).max() / (expected.norm() + upstream))
    return errors


def _limits(case: VerifyCase, truth: dict[str, Tensor]) -> dict[str, float]:
    """Returns how far each tensor may be off; see ``TOLERANCE``."""
    least, most = TOLERANCE[case.dtype]
    if least == most:
        return dict.fromkeys(truth, most)
    alone = replace(
        case,
        strategy="local" if case.mixer is None else case.strategy,
        layout="contiguous",
        layout_block=1,
        world=1,
        options=DEFAULT,
    )
    single = run_rank(alone, None).tensors
    errors = tensor_errors(alone, alone.plan(), single, truth)
    return {name: min(max(least, ROUNDING_FACTOR * error), most) for name, error in errors.items()}
