"""Builds the core attention that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from longctx.attention import AttentionCase, StrategyAttention, get_strategy, inner_of, require, settled
from longctx.attention.runtime.partial import accumulation_dtype
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.assignment import topology_of
from longctx.attention.strategies.disaggregated.ping_pong import PingPongAttention
from longctx.attention.strategies.disaggregated.pipeline import StageAttention
from longctx.comm import group_of
from longctx.config import Config
from longctx.config.sections.model import SOFTMAX_KINDS
from longctx.linear import LinearAttention, LinearCase, get_linear, require_linear
from longctx.mesh import Mesh
from longctx.parallel.data import compute_dtype
from longctx.parallel.stage_servers import prepare_ticks, stage_attention, ticks_by
from longctx.sequence import Layout, Mask, SequencePlan, make_layout


def layout_of(config: Config) -> Layout:
    """Returns the layout that the configuration names, or its strategy's preferred one; softmax layers choose first."""
    attention = config.attention
    preferred = get_strategy(attention.strategy) if config.model.has_softmax else get_linear(config.linear_strategy)
    name = attention.layout or preferred.layout
    return make_layout(name, attention.layout_block)


def mask_of(config: Config) -> Mask:
    """Returns the run's mask: decoders are causal; documents come with each batch."""
    return Mask(causal=True, window=config.attention.window)


def masks_of(config: Config) -> dict[str, Mask]:
    """Returns the mask of each kind of softmax layers that the model has."""
    whole, model = mask_of(config), config.model
    masks = {"S": whole, "W": replace(whole, window=model.window)}
    return {kind: mask for kind, mask in masks.items() if kind in model.kinds}


def layer_plans(config: Config) -> Callable[[SequencePlan], list[tuple[SequencePlan, float]]]:
    """Returns a function that lists a batch's plans, one for each mask, with the share of softmax layers that use it.

    They are the plans that the layers themselves ask for, and live as long as the batch's own.
    """
    kinds = [kind for kind in config.model.kinds if kind in SOFTMAX_KINDS]
    shares, window = {kind: kinds.count(kind) / len(kinds) for kind in dict.fromkeys(kinds)}, config.model.window

    def plans(plan: SequencePlan) -> list[tuple[SequencePlan, float]]:
        of_kind = {"S": plan} if window is None else {"S": plan, "W": plan.windowed(window)}
        return [(of_kind[kind], share) for kind, share in shares.items()]

    return plans


def attention_case(config: Config, mask: Mask | None = None) -> AttentionCase:
    """Returns what the run asks of its attention strategy, on each rank; ``mask``: None for the run's own."""
    heads, kv_heads = config.local_heads
    return AttentionCase(
        world=config.parallel.sp,
        heads=heads,
        kv_heads=kv_heads,
        layout=layout_of(config).name,
        mask=mask or mask_of(config),
        documents=config.attention.document_mask,
        kernel=config.attention.kernel,
        options=config.attention.options,
        half="attention_half" in (config.train.recompute_keep or ()),
    )


def work_of(config: Config, mesh: Mesh) -> Callable[[Sequence[SequencePlan], int, int], float]:
    """Returns a function that counts what attention costs a rank for a step's batches.

    It takes the batches' plans, the rank's stage and its place in the sequence group. It counts (query, key) cells in
    all heads of one layer, or tokens, where no layer has cells. Where stages serve one another, it counts all layers.
    """
    if not config.model.has_softmax:
        return lambda plans, stage, rank: sum(len(plan.positions(rank)) * len(plan.documents) for plan in plans)
    strategy = get_strategy(config.attention.strategy)
    if config.attention.server_pool == "pipeline":
        ticks, sp = ticks_by(config, mesh), config.parallel.sp
        return lambda plans, stage, rank: ticks(plans).work(stage * sp + rank)
    inner, by_layer = inner_of(strategy, attention_case(config)), layer_plans(config)
    halves = (0, 1) if config.attention.ping_pong else (None,)
    return lambda plans, stage, rank: sum(
        share * strategy.work(own if half is None else own.half(half), rank, inner)
        for plan in plans
        for own, share in by_layer(plan)
        for half in halves
    )


def prepare_of(config: Config, mesh: Mesh) -> Callable[[list[SequencePlan]], None]:
    """Returns a function that makes, of a step's plans, what softmax layers would plan at first use."""
    if not config.model.has_softmax:
        return lambda plans: None
    if config.attention.server_pool == "pipeline":
        return prepare_ticks(config, mesh)
    case, strategy, dtype = attention_case(config), get_strategy(config.attention.strategy), config.train.dtype
    element, wide = (kind.itemsize for kind in (compute_dtype(dtype), accumulation_dtype(compute_dtype(dtype))))
    # Asked for here, as process groups belong to a thread under simulation.
    rank, inner, topology = (
        mesh.sequence_rank,
        inner_of(strategy, case),
        topology_of(group_of(mesh.sequence_group).ranks),
    )

    by_layer = layer_plans(config)

    def prepare(plans: list[SequencePlan]) -> None:
        plans = [own for plan in plans for own, _ in by_layer(plan)]
        if config.attention.ping_pong:
            plans = [plan.half(number) for plan in plans for number in (0, 1)]
        for plan in plans:
            widths = (case.heads, case.kv_heads, config.model.head_dim, element, wide)
            strategy.prepare(plan, rank, Sizes(len(plan.documents), *widths, inner, case.options, topology))

    return prepare


def core_attention(config: Config, mesh: Mesh, device: torch.device) -> StrategyAttention | StageAttention | None:
    """Builds one object for all softmax layers, if there are any; ranks of a sequence group call it at the same point.

    ``device``: of q, k and v, which ranks that only serve have none of.
    """
    if not config.model.has_softmax:
        return None
    if config.attention.server_pool == "pipeline":
        return stage_attention(config, mesh, device)
    attention, case = config.attention, attention_case(config)
    options = settled(get_strategy(attention.strategy), case)
    return StrategyAttention(attention.strategy, mesh.sequence_group, attention.kernel, options=options)


def ping_pong_attention(config: Config, mesh: Mesh) -> PingPongAttention:
    """Builds the core attention in three steps, for two halves of a micro-batch that take turns."""
    options = attention_case(config).options
    return PingPongAttention(group_of(mesh.sequence_group), config.attention.kernel, options)


def linear_case(config: Config) -> LinearCase:
    """Returns what the run asks of the strategy of its linear layers, on each rank."""
    attention, heads = config.attention, config.model.linear_heads.value_heads // config.parallel.tp
    assert config.model.mixer is not None, "a pattern with linear layers has a mixer"
    return LinearCase(
        world=config.parallel.sp,
        heads=heads,
        mixer=config.model.mixer,
        layout=layout_of(config).name,
        layout_block=attention.layout_block,
        chunk=attention.chunk,
        causal=True,
    )


def linear_attention(config: Config, mesh: Mesh) -> LinearAttention | None:
    """Builds one object for all linear layers, if there are any."""
    if "L" not in config.model.pattern:
        return None
    return LinearAttention(config.linear_strategy, mesh.sequence_group, config.attention.chunk)


def require_cores(config: Config) -> None:
    """Refuses what a strategy does not execute exactly in layers of its kind. Raises ``ConfigError``."""
    if config.model.has_softmax:
        for mask in masks_of(config).values():
            require(get_strategy(config.attention.strategy), attention_case(config, mask))
    if "L" in config.model.pattern:
        require_linear(get_linear(config.linear_strategy), linear_case(config))


def cells_of(config: Config) -> Callable[[SequencePlan, int], float]:
    """Returns a function that counts the cells of a layer that a rank's own queries see, the mean of softmax layers."""
    if not config.model.has_softmax:
        return lambda plan, rank: plan.work(rank)
    by_layer = layer_plans(config)
    return lambda plan, rank: sum(share * own.work(rank) for own, share in by_layer(plan))
