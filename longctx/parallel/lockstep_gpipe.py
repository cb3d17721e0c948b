"""GPipe in ticks that all stages take together, for stages that compute attention for one another.

Microbatches pass the stages in GPipe's order, so that gradients are the same sums. In addition a stage takes part in
the ticks in which it holds no microbatch (``longctx.attention.strategies.disaggregated.lockstep``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _sorted_batch_p2p, _wait_batch_p2p

from longctx.attention.strategies.disaggregated.lockstep import LockstepPlan, Phase
from longctx.attention.strategies.disaggregated.pipeline import StageAttention
from longctx.sequence import plan_of


class LockstepGPipe(PipelineScheduleSingle):
    """Runs one stage per rank in GPipe's order, tick by tick with all other stages.

    ``attention``: what the layers of the stage call.
    """

    def __init__(
        self, stage: PipelineStage, microbatches: int, attention: StageAttention, loss: Callable[..., Any]
    ) -> None:
        super().__init__(stage, microbatches, loss_fn=loss, scale_grads=False)
        self._attention = attention

    def _step_microbatches(
        self,
        arg_mbs: list[Any] | None = None,
        kwarg_mbs: list[Any] | None = None,
        target_mbs: list[Any] | None = None,
        losses: list[Any] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
    ) -> None:
        inputs, named = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        self._initialize_stage(inputs[0], named[0], None if target_mbs is None else target_mbs[0], loss_kwargs)
        ticks = self._attention.open([plan_of(one["plan"]) for one in named])
        stage = self._stage

        def forward(number: int) -> None:
            output = stage.forward_one_chunk(number, inputs[number], named[number], save_forward_output=return_outputs)
            self._maybe_compute_loss(stage, output, target_mbs, number, loss_kwargs)

        def backward(number: int) -> None:
            loss = self._maybe_get_loss(stage, number)
            stage.backward_one_chunk(number, loss=loss, last_backward=number == len(ticks.plans) - 1)

        self._run(ticks, Phase.FORWARD, stage.get_fwd_recv_ops, forward, stage.get_fwd_send_ops)
        self._run(ticks, Phase.BACKWARD, stage.get_bwd_recv_ops, backward, stage.get_bwd_send_ops)
        self._update_losses(stage, losses)
        stage.perform_reduce_grad(1)

    def _run(
        self,
        ticks: LockstepPlan,
        phase: Phase,
        receive: Callable[[int], list[dist.P2POp]],
        compute: Callable[[int], None],
        send: Callable[[int], list[dist.P2POp]],
    ) -> None:
        """All ticks of a phase. What a stage sends leaves before it serves the rest of the tick."""
        leaving: list[list[dist.Work]] = []
        for tick in range(ticks.count):
            with self._attention.tick(phase, tick):
                number = ticks.microbatch(phase, tick, self._attention.stage)
                if number is None:
                    continue
                for work in _sorted_batch_p2p(receive(number)).values():
                    _wait_batch_p2p(work)
                compute(number)
                leaving += _sorted_batch_p2p(send(number)).values()
        for work in leaving:
            _wait_batch_p2p(work)
