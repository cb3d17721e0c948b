"""Configures attention: the strategies of its layers, what the user chose of them, and what tokens see."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.catalog import KERNELS, LAYOUTS, LINEAR_STRATEGIES, STRATEGIES
from longctx.options import OPTIONS, StrategyOptions
from longctx.rules import at_least, one_of

SERVER_POOLS = ("sequence", "pipeline")


@dataclass(frozen=True)
class AttentionConfig(StrategyOptions):
    """Says who computes attention over the sharded sequence, and how the sequence is cut."""

    strategy: str = "ring"
    layout: str | None = None  # None: what the strategy prefers
    layout_block: int = 1  # tokens per stripe of the striped layout
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    kernel: str = "auto"
    document_mask: bool = True  # tokens see only their own document
    ping_pong: bool = False  # two halves of a micro-batch take turns: one exchanges while the other computes
    server_pool: str = "sequence"  # who serves tasks: ranks of one sp group, or (pipeline) of all stages
    linear: str | None = None  # who moves the states of linear layers; null: strategy, if it is one of theirs, or lasp2
    chunk: int = 64  # tokens that linear layers compute at once

    @property
    def options(self) -> StrategyOptions:
        """Returns what the user chose of the strategy."""
        return StrategyOptions(**{name: getattr(self, name) for name in OPTIONS})

    def check(self) -> None:
        """Refuses names that stand for nothing and windows that see nothing."""
        one_of("attention.strategy", self.strategy, (*STRATEGIES, *LINEAR_STRATEGIES))
        if self.layout is not None:
            LAYOUTS.require(self.layout)
        one_of("attention.kernel", self.kernel, ("auto", *KERNELS))
        at_least("attention.layout_block", self.layout_block, 1)
        at_least("attention.window", self.window, 1)
        super().check()
        one_of("attention.server_pool", self.server_pool, SERVER_POOLS)
        if self.linear is not None:
            LINEAR_STRATEGIES.require(self.linear)
        at_least("attention.chunk", self.chunk, 1, AttentionConfig.chunk)  # others are for linear layers alone
