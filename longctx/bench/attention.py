"""Times attention strategies forward and backward on one sequence group: exact first, then timed in turn.

All ranks of the world call ``measure`` together. Where several sequence groups share the world, all of them do the
same at once, as in a run. What is told of bytes and balance is that of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.runtime.local_kernel import KernelProblem, kernel_for, select_kernel
from longctx.attention.runtime.registry import get_strategy, inner_of, refusal
from longctx.bench.floor import NAME, recorded_pass, replay, rows_of_scores
from longctx.bench.gate import require_exact
from longctx.bench.timing import Entrant, Pass, Report, Timing, seconds_of, silent, time_in_turn
from longctx.comm import group_of
from longctx.comm.rank_numbers import gather_numbers
from longctx.errors import ConfigError
from longctx.operators import IMPLEMENTATIONS
from longctx.sequence import SequencePlan
from longctx.verify import VerifyCase, refusal_of
from longctx.verify.case import DTYPES
from longctx.verify.linear import mixer_of
from longctx.verify.memory import PeakMemory
from longctx.verify.run import attention_of, core_of, shared_inputs, whole_inputs


@dataclass(frozen=True)
class StrategyRow:
    """Holds what was measured of one strategy; of a refused one, only why.

    ``errors``: of the small shape, by tensor. ``bytes_forward``, ``bytes_backward``, ``work``: by rank of the sequence
    group; work is in (query, key) cells of a head, of linear layers in tokens. ``balance``: most work over the mean.
    ``peak_extra_bytes``: live tensors beside the inputs, of the worst rank.
    """

    strategy: str
    layout: str
    mixer: str | None = None
    refused: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    time: Timing | None = None
    floor: Timing | None = None
    share_of_floor: Timing | None = None
    bytes_forward: list[int] = field(default_factory=list)
    bytes_backward: list[int] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    balance: float | None = None
    peak_extra_bytes: int | None = None


@dataclass(kw_only=True)
class _Contender(Entrant):
    """A strategy that is timed. ``spent``: bytes forward, bytes backward, peak extra bytes, by rank of the group."""

    case: VerifyCase
    errors: dict[str, float]
    work: list[float]
    spent: list[list[float]]

    def row(self) -> StrategyRow:
        forward, backward, peaks = (list(map(int, column)) for column in zip(*self.spent, strict=True))
        floors = self.floor is not None
        return StrategyRow(
            self.case.strategy,
            self.case.layout,
            self.case.mixer,
            errors=self.errors,
            time=Timing.of(self.seconds),
            floor=Timing.of(self.floor_seconds) if floors else None,
            share_of_floor=Timing.of(self.shares) if floors else None,
            bytes_forward=forward,
            bytes_backward=backward,
            work=self.work,
            balance=max(self.work) * len(self.work) / sum(self.work) if sum(self.work) else 1.0,
            peak_extra_bytes=max(peaks),
        )


def refusal_on(case: VerifyCase, device_type: str) -> str | None:
    """Returns why the case is not executed exactly on devices of that type; None if it is."""
    if case.mixer is not None:
        return refusal_of(case)
    problem = KernelProblem(device_type, DTYPES[case.dtype], case.heads, case.kv_heads, case.head_dim)
    try:
        reason = refusal(get_strategy(case.strategy), case.attention_case)
        if reason is None:
            case.make_layout()
            select_kernel(case.kernel, problem)
    except ConfigError as error:
        reason = str(error)
    return reason


def measure(
    cases: Sequence[VerifyCase],
    group: dist.ProcessGroup | None,
    device: torch.device,
    repeats: int,
    floors: bool = True,
    report: Report = silent,
) -> list[StrategyRow]:
    """Measures each case, of which none is refused. Raises ``NumericsError`` before any timing if one is wrong.

    ``floors``: whether each strategy's own tiles are timed beside it, for which what its kernel was asked is kept.
    """
    errors = []
    for number, case in enumerate(cases):
        report(number, len(cases), f"checking {_name(case)}")
        errors.append(require_exact(case, group, device))
    inputs: dict[tuple[str | None, int, int], dict[str, Tensor]] = {}
    contenders, rank = [], group_of(group).rank
    for number, (case, found) in enumerate(zip(cases, errors, strict=True)):
        report(number, len(cases), f"warming up {_name(case)}")
        plan = case.plan()
        key = (case.mixer, len(plan.positions(rank)), plan.shard)
        if key not in inputs:  # strategies of one kind read the same tensors
            inputs[key] = _local_inputs(case, plan, rank, device)
        contenders.append(_contender(case, plan, inputs[key], group, found, floors))
    time_in_turn(contenders, repeats, device, report)
    return [contender.row() for contender in contenders]


def _name(case: VerifyCase) -> str:
    return f"{case.strategy} on {case.layout}" + (f" ({case.mixer})" if case.mixer else "")


def _contender(
    case: VerifyCase,
    plan: SequencePlan,
    local: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    errors: dict[str, float],
    floors: bool,
) -> _Contender:
    dout = local["dout"]
    given = {name: tensor for name, tensor in local.items() if name != "dout"}
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    compute = core_of(case, group)

    def run() -> None:
        torch.autograd.grad(compute(given, plan.handle), wanted, dout)

    made = _Contender(
        name=_name(case),
        run=run,
        case=case,
        errors=errors,
        work=_work(case, plan),
        spent=_spent(lambda: compute(given, plan.handle), wanted, dout, group),
    )
    made.first = seconds_of(run, dout.device)
    if floors and case.mixer is None:
        made.floor = _floor(case, plan, local, group)
    return made


def _local_inputs(case: VerifyCase, plan: SequencePlan, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Draws random tensors of a rank's share ``[B, T/SP, H, D]``, and of heads ``[H, ...]``; rows of padding are 0."""
    alone = replace(case, seq=plan.shard, world=1, documents=())
    fixed = mixer_of(case).constants(case.heads, 0, 2) if case.mixer is not None else {}
    by_head, own = shared_inputs(alone), len(plan.positions(rank))
    local = {}
    for name, whole in whole_inputs(alone).items():
        if name not in by_head:
            whole[:, own:] = 0
        local[name] = whole.to(device).requires_grad_(name != "dout" and name not in fixed)
    return local


def _spent(
    forward: Callable[[], Tensor], wanted: Sequence[Tensor], dout: Tensor, group: dist.ProcessGroup | None
) -> list[list[float]]:
    """Returns what a pass costs each rank of the group: bytes sent forward and backward, and peak extra bytes."""
    traffic = group_of(group).traffic
    before = traffic.bytes
    with PeakMemory(IMPLEMENTATIONS) as memory:
        out = forward()
        between = traffic.bytes
        torch.autograd.grad(out, wanted, dout)
    own = [between - before, traffic.bytes - between, memory.peak]
    return [list(map(float, own))] if group is None else gather_numbers(own, group, dout.device)


def _work(case: VerifyCase, plan: SequencePlan) -> list[float]:
    """Counts what each rank of the group computes."""
    if case.mixer is not None:
        return [float(len(plan.positions(rank))) for rank in range(plan.world)]
    strategy = get_strategy(case.strategy)
    inner = inner_of(strategy, case.attention_case)
    return [float(strategy.work(plan, rank, inner)) for rank in range(plan.world)]


def _floor(case: VerifyCase, plan: SequencePlan, local: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Pass:
    if case.strategy == "rsa":
        return rows_of_scores(case, group_of(group).rank, local["q"].device)
    tensors = [local[name] for name in ("q", "k", "v", "dout")]
    kernel = kernel_for(case.kernel, tensors[0], tensors[1])
    asked = recorded_pass(lambda: attention_of(replace(case, kernel=NAME), group), plan, tensors, kernel)
    return replay(kernel, asked)
