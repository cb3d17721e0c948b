"""Drives a pipeline: torch's schedules run the micro-batches of a step through the stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from longctx.engines.native import NativeEngine
from longctx.mesh import Mesh
from longctx.parallel.data import compute_dtype
from longctx.parallel.pipeline import MicrobatchShape, Pipeline, make_schedule, pass_stages
from longctx.sequence import LocalBatch


class PipelineEngine(NativeEngine):
    """Drives the stages of a pipeline that are on this rank.

    ``model`` has passed through ``parallelize``; ``optimizer`` holds the parameters of its stages.

    Every rank of a pipeline takes the same micro-batches. Gradients of a stage are reduced once, after its last
    micro-batch. Its parameters stay gathered until then: with several in flight they would be gathered for each.
    """

    def __init__(self, model: Pipeline, optimizer: Optimizer, mesh: Mesh, schedule: str, dtype: str) -> None:
        super().__init__(model, optimizer)
        self.pipeline = model
        self._mesh = mesh
        self._group = mesh.pipeline_group
        self._parts = mesh.tensor.size()
        self._name = schedule
        self._dtype = compute_dtype(dtype)
        self._schedule: tuple[MicrobatchShape, Any] | None = None
        self._sums: list[Tensor] = []

    def accumulate(self, batches: Sequence[LocalBatch], scale: float) -> Tensor:
        """Runs the schedule; see ``Engine``. The sum of the loss is the last stage's, other ranks return 0."""
        first = batches[0].tokens
        rows, length = first.shape
        schedule = self._schedule_for(MicrobatchShape(len(batches), rows, length, self._parts), first.device)
        inputs: dict[str, Any] = {
            "positions": torch.cat([batch.positions for batch in batches]),
            "plan": torch.stack([batch.plan.handle for batch in batches]),
        }
        if self.pipeline.last is not None:
            inputs["labels"] = torch.cat([batch.labels for batch in batches])
            inputs["target"] = torch.full((len(batches),), scale, dtype=torch.float64, device=first.device)
        tokens = [torch.cat([batch.tokens for batch in batches])] if self.pipeline.first is not None else []
        self._sums.clear()
        schedule.step(*tokens, return_outputs=False, **inputs)
        self.pipeline.sum_tied_gradients(self._group)
        return torch.stack(self._sums).sum() if self._sums else torch.zeros((), dtype=self._dtype, device=first.device)

    def forward(self, batch: LocalBatch) -> Tensor:
        """Passes one microbatch through the stages, one after another; the sum of the loss is the last stage's."""
        loss = pass_stages(self.pipeline, batch, self._mesh, self._dtype, batch.labels)
        return torch.zeros((), dtype=self._dtype, device=batch.tokens.device) if loss is None else loss

    def counted(self) -> list[torch.nn.Parameter]:
        """Lists the parameters of this rank's stages of which it holds a share, each once."""
        return [parameter for _, parameter in self.pipeline.own_parameters()]

    def _schedule_for(self, shape: MicrobatchShape, device: torch.device) -> Any:
        if self._schedule is None:
            schedule = make_schedule(self.pipeline, self._name, self._group, shape, self._dtype, device, self._weigh)
            self._schedule = (shape, schedule)
        known, schedule = self._schedule
        assert known == shape, f"stages receive {known}, a step brought {shape}: shapes are constants of the run"
        return schedule

    def _weigh(self, loss: Tensor, scale: Tensor) -> Tensor:
        self._sums.append(loss.detach())
        return (loss * scale.to(loss.dtype)).sum()
