"""Attention across pipeline stages as a configuration asks for it (``disaggregated.pipeline``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from longctx.attention.strategies.disaggregated.assignment import topology_of
from longctx.attention.strategies.disaggregated.execute import PLANNERS
from longctx.attention.strategies.disaggregated.lockstep import LockstepPlan, lockstep_plan_of
from longctx.attention.strategies.disaggregated.pipeline import Empty, StageAttention
from longctx.comm import channel_of
from longctx.config import Config
from longctx.config.sections.model import SOFTMAX_KINDS
from longctx.mesh import Mesh
from longctx.parallel.data import compute_dtype
from longctx.parallel.stages import parts_of
from longctx.sequence import SequencePlan

CPU = torch.device("cpu")


def stage_attention(config: Config, mesh: Mesh, device: torch.device) -> StageAttention:
    """Makes the attention of all softmax layers of this rank's stage.

    All ranks of the pipeline call it at one point.
    """
    attention, stage = config.attention, mesh.pipeline.get_local_rank()
    # Where a sequence is whole on one rank these are the ranks of a pipeline, whose stages hand on hidden states.
    group = channel_of(mesh.servers(), mesh.sequence_group)
    empty, planner = empty_of(config, device), PLANNERS[attention.strategy]
    return StageAttention(group, softmax_layers(config), stage, empty, planner, attention.kernel, attention.options)


def empty_of(config: Config, device: torch.device) -> Empty:
    """Returns the tensors of a rank without tokens in an exchange."""
    return Empty(*config.local_heads, config.model.head_dim, compute_dtype(config.train.dtype), device)


def softmax_layers(config: Config) -> list[int]:
    """Returns how many softmax layers every stage has."""
    return [sum(config.model.kinds[layer] in SOFTMAX_KINDS for layer in part.layers) for part in parts_of(config)]


def ticks_by(config: Config, mesh: Mesh) -> Callable[[Sequence[SequencePlan]], LockstepPlan]:
    """Returns a function that makes the ticks of a step from the plans of its microbatches."""
    layers, planner = softmax_layers(config), PLANNERS[config.attention.strategy]
    widths, topology = empty_of(config, CPU).widths, topology_of(mesh.server_ranks)
    return lambda plans: lockstep_plan_of(plans, layers, planner, widths, topology)


def prepare_ticks(config: Config, mesh: Mesh) -> Callable[[list[SequencePlan]], None]:
    """Returns a function that plans all ticks of a step ahead of time."""
    ticks, rank = ticks_by(config, mesh), mesh.pipeline.get_local_rank() * mesh.sequence_size + mesh.sequence_rank
    kept: deque[LockstepPlan] = deque(maxlen=2)  # of the step that is to run, and of the one after it

    def prepare(plans: list[SequencePlan]) -> None:
        kept.append(ticks(plans))
        kept[-1].ready(rank)

    return prepare
