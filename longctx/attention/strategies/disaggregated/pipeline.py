"""Disaggregated attention across pipeline stages: the ranks of all stages are servers, with one plan per exchange.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025), in place and
with a pipeline. All stages run the same phase (``disaggregated.lockstep``), so that in every exchange all of them
compute the forward or all the backward pass of attention:

    for tick in ticks:
        a stage with a microbatch    layer by layer: sends its tokens, computes for others, receives its results
        every stage                  computes for others in the tick's further exchanges, with no tokens of its own

The attention object whose tick is running knows which exchange an operator's call is. The handle that the operator is
given names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.core import Started
from longctx.attention.runtime.borders import HANDLE, require_plain
from longctx.attention.runtime.local_kernel import kernel_for
from longctx.attention.runtime.operator import (
    AttentionContext,
    Saved,
    define_strategy,
    encoded,
    require_rows,
)
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.attention.strategies.disaggregated.assignment import topology_of
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.attention.strategies.disaggregated.execute import BackwardRun, ForwardRun
from longctx.attention.strategies.disaggregated.lockstep import LockstepPlan, Phase, lockstep_plan_of
from longctx.attention.strategies.disaggregated.prepared import widths_of
from longctx.comm import Group
from longctx.options import DEFAULT, StrategyOptions
from longctx.planner import AttentionShape
from longctx.sequence import SequencePlan
from longctx.sequence.handles import name


@dataclass
class RunningTick:
    """Follows one rank through one tick. ``made``: exchanges that it has joined so far."""

    ticks: LockstepPlan
    phase: Phase
    number: int
    stage: int
    made: int = 0

    def next(self, phase: Phase, plan: SequencePlan) -> Dispatch:
        """Returns the exchange of the stage's next layer, forward, or of the one before, backward."""
        microbatch = self.ticks.microbatch(self.phase, self.number, self.stage)
        assert phase is self.phase, f"{phase.value} pass of attention in {self._name}"
        assert self.made < self.ticks.layers[self.stage], f"call {self.made} of attention in {self._name}"
        assert microbatch is not None and plan is self.ticks.plans[microbatch], f"another microbatch in {self._name}"
        self.made += 1
        return self.ticks.dispatch(phase, self.number, self.made - 1)

    def rest(self) -> Iterator[Dispatch]:
        """Yields the exchanges in which this stage has no tokens."""
        microbatch = self.ticks.microbatch(self.phase, self.number, self.stage)
        own = 0 if microbatch is None else self.ticks.layers[self.stage]
        assert self.made == own, f"{self.made} of {own} layers attended in {self._name}"
        for exchange in range(own, self.ticks.exchanges(self.phase, self.number)):
            yield self.ticks.dispatch(self.phase, self.number, exchange)

    @property
    def _name(self) -> str:
        return f"{self.phase.value} tick {self.number} on stage {self.stage}"


class StagePlan:
    """Joins a microbatch's plan with the attention of one stage; operators across stages are given its handle.

    ``attention``: whose running tick knows which exchange a call is.
    """

    def __init__(self, plan: SequencePlan, attention: StageAttention) -> None:
        self.plan, self._attention = plan, attention
        self.handle: Tensor = name(self)

    def dispatch(self, phase: Phase) -> Dispatch:
        """Returns the exchange that the running tick comes to next."""
        running = self._attention.running
        assert running is not None, "attention across stages is computed inside StageAttention.tick"
        return running.next(phase, self.plan)


def _dispatch(context: AttentionContext, phase: Phase) -> Dispatch:
    assert isinstance(context.named, StagePlan), "StageAttention makes the handles"
    return context.named.dispatch(phase)


def _forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    run = ForwardRun(q, k, v, context, _dispatch(context, Phase.FORWARD))
    run.serve()
    return run.finish()


def _backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    run = BackwardRun(dout, saved, context, _dispatch(context, Phase.BACKWARD))
    run.serve()
    return run.finish()


_attend = define_strategy("disaggregated_across_stages", _forward, _backward, fits=require_rows)


@dataclass(frozen=True)
class Empty:
    """Describes the tensors of a rank in an exchange in which it only serves: of its heads and no tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def widths(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.dtype.itemsize)

    @property
    def saved(self) -> Saved:
        """Returns q, k, v, out and lse of no tokens."""
        q = torch.empty(1, 0, self.heads, self.head_dim, dtype=self.dtype, device=self.device)
        k = q.new_empty(1, 0, self.kv_heads, self.head_dim)
        return q, k, k, q, q.new_empty(q.shape[:3], dtype=accumulation_dtype(self.dtype))


class StageAttention:
    """Computes attention on the ranks of all stages that share sequences, which compute for one another tick by tick.

    ``group``: those ranks, stage by stage, on a channel that carries nothing else. ``layers``: softmax layers of every
    stage; ``stage``: this rank's. ``empty``: its tensors where it only serves. ``planner``: who assigns tasks.
    """

    def __init__(
        self,
        group: Group,
        layers: Sequence[int],
        stage: int,
        empty: Empty,
        planner: str,
        kernel: str = "auto",
        options: StrategyOptions = DEFAULT,
    ) -> None:
        self.layers, self.stage = tuple(layers), stage
        self._group, self._empty, self._planner = group, empty, planner
        self._kernel, self._options = kernel, options
        self._ticks: LockstepPlan | None = None
        self._plans: dict[int, StagePlan] = {}  # by what the handle of each microbatch's plan says
        self.running: RunningTick | None = None

    def open(self, plans: Sequence[SequencePlan]) -> LockstepPlan:
        """Returns the ticks of a step on these microbatches; all ranks of all stages have the same."""
        self._ticks = lockstep_plan_of(
            plans, self.layers, self._planner, self._empty.widths, topology_of(self._group.ranks)
        )
        self._plans = {plan.id: StagePlan(plan, self) for plan in plans}
        return self._ticks

    @contextmanager
    def tick(self, phase: Phase, number: int) -> Iterator[None]:
        """Runs one tick: inside, the stage takes its microbatch through its layers; at the end it serves the rest."""
        assert self._ticks is not None, "a step is opened before its ticks"
        self.running = running = RunningTick(self._ticks, phase, number, self.stage)
        try:
            yield
            with torch.no_grad():
                for dispatch in running.rest():
                    self._serve(phase, dispatch)
        finally:
            self.running = None

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """Computes attention of the local tokens of a microbatch.

        q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]``; ``plan``: the handle of the microbatch's plan.
        """
        require_plain((("q", q), ("k", k), ("v", v), (HANDLE, plan)))
        assert (widths_of(q, k), q.dtype) == (self._empty.widths, self._empty.dtype), "servers expect these heads"
        scale, options = q.shape[-1] ** -0.5, encoded(self._options)
        assert int(plan) in self._plans, "attention across stages is inside StageAttention.tick, of opened plans"
        handle = self._plans[int(plan)].handle
        return Started(_attend(q, k, v, handle, self._group.name, self._kernel, scale, options)[0])

    def finish(self, started: Started) -> Tensor:
        """Returns attention of the local queries, ``[B, T/SP, H/TP, D]``."""
        return started.out

    def _serve(self, phase: Phase, dispatch: Dispatch) -> None:
        assert self._ticks is not None, "inside a tick"
        saved = q, k, v, _, _ = self._empty.saved
        # Without queries it has no batch of its own; any will do.
        plan, kernel = self._ticks.plans[0], kernel_for(self._kernel, q, k)
        context = AttentionContext(plan, self._group, kernel, q.shape[-1] ** -0.5, self._options, plan)
        if phase is Phase.FORWARD:
            run: ForwardRun | BackwardRun = ForwardRun(q, k, v, context, dispatch)
        else:
            run = BackwardRun(q, saved, context, dispatch)
        run.serve()
        run.finish()
