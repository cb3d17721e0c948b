"""The core attention that a configuration asks for."""

from __future__ import annotations

from longctx.attention import AttentionCase, Options, StrategyAttention, get_strategy, inner_of
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.sequence import Layout, Mask, make_layout


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
        tail="attention_tail" in (config.train.recompute_keep or ()),
    )


def core_attention(config: Config, mesh: Mesh) -> StrategyAttention:
    """One object for all layers; ranks of a sequence group call it at the same point."""
    attention, case = config.attention, attention_case(config)
    inner = inner_of(get_strategy(attention.strategy), case)
    return StrategyAttention(
        attention.strategy, mesh.sequence_group, attention.kernel, inner=inner, options=case.options
    )
