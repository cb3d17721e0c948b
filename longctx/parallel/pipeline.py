"""Runs pipeline stages on ``torch.distributed.pipelining``.

A stage is a decoder with only its part kept. Each microbatch brings its positions, its labels and the handle of its
sequence plan as rows of tensors, to every rank of the pipeline. torch hands tensors on row by row, but gives whatever
is no tensor to all microbatches alike. That would be one microbatch's mask for all. Ranks of a pipeline read the same
data and make the same plans. So a handle names a plan of the process that reads it and is never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from longctx.attention.strategies.disaggregated.lockstep import Phase
from longctx.attention.strategies.disaggregated.pipeline import StageAttention
from longctx.comm import exchange, group_of
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.model import Decoder
from longctx.parallel.lockstep_gpipe import LockstepGPipe
from longctx.parallel.stages import parts_of, stage_numbers
from longctx.sequence import LocalBatch

ONE_STAGE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL_STAGES: dict[str, Any] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Pipeline(nn.Module):
    """The stages of a decoder that this rank holds, by their number among all ``total`` stages.

    With tied embeddings the last stage has a copy of the first one's, which is the same parameter. Its gradient is the
    sum over both. A norm, an update's decisions and a checkpoint know it once.
    """

    def __init__(self, stages: Mapping[int, Decoder], owners: Sequence[int]) -> None:
        """``owners``: the pipeline rank of every stage. ``servers``: set where stages serve one another's attention."""
        super().__init__()
        self.numbers = tuple(stages)
        self.total = len(owners)
        self.owners = tuple(owners)
        self.servers: StageAttention | None = None
        for number, stage in stages.items():
            self.add_module(f"stage_{number}", stage)

    @property
    def stages(self) -> list[Decoder]:
        """Stages that this rank holds, in the order in which data pass them."""
        return cast("list[Decoder]", list(self.children()))

    @property
    def first(self) -> Decoder | None:
        return next((stage for stage in self.stages if stage.part.first), None)

    @property
    def last(self) -> Decoder | None:
        return next((stage for stage in self.stages if stage.part.last), None)

    def own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yields parameters by their names in the whole model, without the copy of a tied embedding."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                if stage.part.first or name != "embedding.weight":
                    yield name, parameter

    def sum_tied_gradients(self, group: dist.ProcessGroup) -> None:
        """Gives both copies of a tied embedding the sum of their gradients; all ranks of the pipeline call it.

        Both ranks add the same two numbers, and addition commutes: the copies stay equal bit by bit.
        """
        copies = [stage for stage in (self.first, self.last) if stage is not None]
        if not copies or not copies[0].config.tie_embeddings:
            return
        gradients = [_local_gradient(stage) for stage in copies]
        first, last = self.owners[0], self.owners[-1]
        if first == last:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
            return
        ranks = group_of(group)
        other = last if ranks.rank == first else first
        received = torch.empty_like(gradients[0])
        exchange(ranks, [(other, gradients[0])], [(other, received)]).wait()
        gradients[0].add_(received)


def decoders(model: Decoder | Pipeline) -> list[Decoder]:
    """Returns what runs forward on this rank: the stages that it holds, or the whole model."""
    return model.stages if isinstance(model, Pipeline) else [model]


def cut_into_stages(model: Decoder, config: Config, mesh: Mesh) -> Pipeline:
    """Returns this rank's stages of ``model``; the other parts are freed."""
    parallel, parts = config.parallel, parts_of(config)
    owners = [0] * parallel.stages
    for rank in range(parallel.pp):
        for number in stage_numbers(parallel, rank):
            owners[number] = rank
    mine = stage_numbers(parallel, mesh.pipeline.get_local_rank())
    return Pipeline({number: model.cut(parts[number]) for number in mine}, owners)


def run_forward(pipeline: Pipeline, batch: LocalBatch, mesh: Mesh, dtype: torch.dtype) -> Tensor:
    """Computes logits ``[B, T/SP, V]`` of one batch on the ranks of all stages, stage after stage.

    It uses no schedule. ``dtype``: of hidden states. All ranks of the pipeline call it, without gradients.
    """
    x = pass_stages(pipeline, batch, mesh, dtype)
    if x is None:
        vocab_size = pipeline.stages[0].config.vocab_size
        x = torch.empty(*batch.tokens.shape, vocab_size, dtype=dtype, device=batch.tokens.device)
    dist.broadcast(x, group=mesh.pipeline_group, group_src=pipeline.owners[-1])
    return x


def pass_stages(
    pipeline: Pipeline, batch: LocalBatch, mesh: Mesh, dtype: torch.dtype, labels: Tensor | None = None
) -> Tensor | None:
    """Passes one batch through all stages, one after another; returns what the last one gives, None on other ranks.

    That is logits ``[B, T/SP, V]``, or with ``labels`` the sum of the loss. ``dtype``: of hidden states. All ranks of
    the pipeline call it, without gradients.
    """
    if pipeline.servers is not None:
        pipeline.servers.open([batch.plan])
    return through_stages(pipeline, (batch.tokens, batch.positions, batch.plan.handle), mesh, dtype, labels)


def through_stages(
    pipeline: Pipeline,
    inputs: tuple[Tensor, Tensor, Tensor],
    mesh: Mesh,
    dtype: torch.dtype,
    labels: Tensor | None = None,
) -> Tensor | None:
    """Passes tokens, their positions and a plan's handle through all stages, as ``pass_stages`` does a batch."""
    x, positions, plan = inputs
    ranks, rows, tokens = group_of(mesh.pipeline_group), *x.shape
    device, width = x.device, pipeline.stages[0].config.dim
    stages = dict(zip(pipeline.numbers, pipeline.stages, strict=True))
    for number in range(pipeline.total):
        owner, before = pipeline.owners[number], pipeline.owners[max(number - 1, 0)]
        with nullcontext() if pipeline.servers is None else pipeline.servers.tick(Phase.FORWARD, number):
            if owner != before and ranks.rank == before:
                exchange(ranks, [(owner, x.contiguous())], []).wait()
            if number not in stages:
                continue
            if owner != before:
                hidden = torch.empty(rows, tokens // mesh.tensor.size(), width, dtype=dtype, device=device)
                (x,) = exchange(ranks, [], [(before, hidden)]).wait()
            x = stages[number](x, positions, plan, labels)
    return None if pipeline.last is None else x


def _local_gradient(stage: Decoder) -> Tensor:
    assert stage.embedding is not None and stage.embedding.weight.grad is not None, "after the backward pass"
    gradient = stage.embedding.weight.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@dataclass(frozen=True)
class MicrobatchShape:
    """The shape of what passes between stages, for each of ``microbatches``.

    These are tokens ``[rows, T/SP]``, or hidden states of which each of ``parts`` tensor-parallel ranks has its own,
    ``[rows, T/SP/TP, dim]``.
    """

    microbatches: int
    rows: int
    tokens: int
    parts: int


def make_schedule(
    pipeline: Pipeline,
    name: str,
    group: dist.ProcessGroup,
    shape: MicrobatchShape,
    dtype: torch.dtype,
    device: torch.device,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Makes torch's schedule of that name over the pipeline's stages, or that of stages that serve one another.

    ``dtype``: of hidden states. ``loss`` turns the last stage's output and its row of ``target`` into what is
    differentiated. Shapes are stated, for otherwise torch would find them out by sending pickled objects.
    """
    stages = [
        PipelineStage(stage, number, pipeline.total, device, *_examples(stage, shape, dtype), group=group)
        for number, stage in zip(pipeline.numbers, pipeline.stages, strict=True)
    ]
    if pipeline.servers is not None:
        return LockstepGPipe(stages[0], shape.microbatches, pipeline.servers, loss)
    if name in ONE_STAGE:
        return ONE_STAGE[name](stages[0], shape.microbatches, loss_fn=loss, scale_grads=False)
    return SEVERAL_STAGES[name](stages, shape.microbatches, loss_fn=loss, scale_grads=False)


def _examples(stage: Decoder, shape: MicrobatchShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns input and output of one microbatch, without storage."""
    size = (shape.rows, shape.tokens)
    local = (shape.rows, shape.tokens // shape.parts, stage.config.dim)
    hidden = torch.empty(local, dtype=dtype, device="meta", requires_grad=True)
    loss_dtype = torch.promote_types(dtype, torch.float32)
    return (
        torch.empty(size, dtype=torch.int64, device="meta") if stage.part.first else hidden,
        torch.empty((), dtype=loss_dtype, device="meta", requires_grad=True) if stage.part.last else hidden,
    )
