"""Running a case on one rank, and judging what all ranks computed against the dense reference."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import StrategyAttention, dense_attention, get_strategy
from longctx.attention.operator import IMPLEMENTATIONS
from longctx.attention.registry import inner_of
from longctx.comm import group_of
from longctx.sequence import SequencePlan, unshard
from longctx.verify.case import ROUNDING_FACTOR, TENSORS, TOLERANCE, RankResult, Verdict, VerifyCase
from longctx.verify.memory import PeakMemory


def run_rank(case: VerifyCase, group: dist.ProcessGroup | None) -> RankResult:
    """Forward and backward of this rank's share, with the random upstream gradient of the case."""
    ranks, plan = group_of(group), case.plan()
    q, k, v, dout = (cut(whole, plan, ranks.rank) for whole in case.inputs())
    for tensor in (q, k, v):
        tensor.requires_grad_()
    attention = attention_of(case, group)
    before = ranks.traffic.bytes
    with PeakMemory(IMPLEMENTATIONS) as memory:
        out = attention(q, k, v, plan.handle)
        between = ranks.traffic.bytes
        grads = torch.autograd.grad(out, (q, k, v), dout)
    tensors = dict(zip(TENSORS, (out.detach(), *grads), strict=True))
    return RankResult(tensors, between - before, ranks.traffic.bytes - between, memory.peak)


def attention_of(case: VerifyCase, group: dist.ProcessGroup | None) -> StrategyAttention:
    """The case's strategy; ranks of the group call it at the same point."""
    inner = inner_of(get_strategy(case.strategy), case.attention_case)
    return StrategyAttention(case.strategy, group, case.kernel, inner=inner, options=case.options)


def cut(whole: Tensor, plan: SequencePlan, rank: int) -> Tensor:
    """This rank's rows of ``[B, S, ...]`` in a shard of physical length, ``[B, T/SP, ...]``; padding is 0."""
    where = torch.from_numpy(plan.positions(rank))
    local = whole.new_zeros(whole.shape[0], plan.shard, *whole.shape[2:])
    local[:, : len(where)] = whole[:, where]
    return local


def reference(case: VerifyCase) -> dict[str, Tensor]:
    """(out, dq, dk, dv) of dense attention in float64, on the case's inputs as rounded to its dtype."""
    q, k, v, dout = (whole.double() for whole in case.inputs())
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = dense_attention(q, k, v, case.packing, case.mask)
    return dict(zip(TENSORS, (out.detach(), *torch.autograd.grad(out, (q, k, v), dout)), strict=True))


def judge(case: VerifyCase, results: list[RankResult]) -> tuple[Verdict, dict[str, Tensor]]:
    """The verdict, and the whole computed tensors in natural order (with the inputs) for ``--dump``."""
    plan, truth = case.plan(), reference(case)
    whole = {name: unshard([result.tensors[name] for result in results], plan) for name in TENSORS}
    q, k, v, dout = case.inputs()
    errors = _errors(case, plan, whole, truth, dout)
    limits = _limits(case, truth, dout)
    padding = any(
        bool(result.tensors[name][:, len(plan.positions(rank)) :].any())
        for rank, result in enumerate(results)
        for name in TENSORS
    )
    verdict = Verdict(
        strategy=case.strategy,
        layout=case.layout,
        mixer=None,
        world=case.world,
        backend=case.backend,
        dtype=case.dtype,
        refused=None,
        errors=errors,
        bytes_forward=[result.bytes_forward for result in results],
        bytes_backward=[result.bytes_backward for result in results],
        peak_extra_bytes=max(result.peak_extra_bytes for result in results),
        # A NaN compares false: it never passes.
        passed=not padding and all(errors[name] <= limits[name] for name in TENSORS),
    )
    return verdict, {"q": q, "k": k, "v": v, "dout": dout, **whole}


def refused(case: VerifyCase, reason: str) -> Verdict:
    return Verdict(case.strategy, case.layout, None, case.world, case.backend, case.dtype, reason, {}, [], [], 0, False)


def _errors(
    case: VerifyCase, plan: SequencePlan, whole: dict[str, Tensor], truth: dict[str, Tensor], dout: Tensor
) -> dict[str, float]:
    """Worst rank's error norm over (norm of the whole reference + 1e-3 of the upstream gradient's)."""
    upstream = 1e-3 * dout.double().norm()
    errors = {}
    for name in TENSORS:
        difference = whole[name].double() - truth[name]
        by_rank = [difference[:, torch.from_numpy(plan.positions(rank))].norm() for rank in range(case.world)]
        errors[name] = float(torch.stack(by_rank).max() / (truth[name].norm() + upstream))
    return errors


def _limits(case: VerifyCase, truth: dict[str, Tensor], dout: Tensor) -> dict[str, float]:
    """How far each tensor may be off; see ``TOLERANCE``."""
    least, most = TOLERANCE[case.dtype]
    if least == most:
        return dict.fromkeys(TENSORS, most)
    alone = replace(
        case,
        strategy="local",
        layout="contiguous",
        layout_block=1,
        world=1,
        inner=None,
        backward="auto",
        travel="wide",
    )
    single = run_rank(alone, None).tensors
    errors = _errors(alone, alone.plan(), single, truth, dout)
    return {name: min(max(least, ROUNDING_FACTOR * error), most) for name, error in errors.items()}
