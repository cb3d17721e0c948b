"""The core attention that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from longctx.attention import AttentionCase, Options, StrategyAttention, get_strategy, inner_of
from longctx.attention.ping_pong import PingPongAttention
from longctx.comm import group_of
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.sequence import Layout, Mask, SequencePlan, make_layout


def layout_of(config: Config) -> Layout:
    """The layout that the configuration names, or the one that its strategy prefers."""
    attention = config.attention
    name = attention.layout or get_strategy(attention.strategy).layout
    return make_layout(name, attention.layout_block)


def mask_of(config: Config) -> Mask:
    """Decoders are causal; documents come with each batch."""
    return Mask(causal=True, window=config.attention.window)


def attention_case(config: Config) -> AttentionCase:
    """What the run asks of its attention strategy, on each rank."""
    heads, kv_heads = config.local_heads
    return AttentionCase(
        world=config.parallel.sp,
        heads=heads,
        kv_heads=kv_heads,
        layout=layout_of(config).name,
        mask=mask_of(config),
        documents=config.attention.document_mask,
        kernel=config.attention.kernel,
        inner=config.attention.inner,
        options=Options(config.attention.backward, config.attention.travel),
    )


def work_of(config: Config) -> Callable[[SequencePlan, int], float]:
    """(query, key) cells that a rank of the sequence group computes of a batch, in all its heads."""
    strategy = get_strategy(config.attention.strategy)
    inner = inner_of(strategy, attention_case(config))
    return lambda plan, rank: strategy.work(plan, rank, inner)


def core_attention(config: Config, mesh: Mesh) -> StrategyAttention:
    """One object for all layers; ranks of a sequence group call it at the same point."""
    attention, case = config.attention, attention_case(config)
    inner = inner_of(get_strategy(attention.strategy), case)
    return StrategyAttention(
        attention.strategy, mesh.sequence_group, attention.kernel, inner=inner, options=case.options
    )


def ping_pong_attention(config: Config, mesh: Mesh) -> PingPongAttention:
    """The same in three steps, for two halves of a micro-batch that take turns."""
    options = attention_case(config).options
    return PingPongAttention(group_of(mesh.sequence_group), config.attention.kernel, options)
