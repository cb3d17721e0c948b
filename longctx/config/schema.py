"""Defines the configuration of a run: one frozen tree, with the schema and defaults of everything that can be set.

Rules that look at one section stand in that section's class (``sections``). Rules that look across sections stand in
``across`` and, where the world size is needed, in ``resolve``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from longctx.catalog import LINEAR_STRATEGIES
from longctx.config.across import RULES
from longctx.config.parsing import as_dict, parse
from longctx.config.renamed import translated
from longctx.config.sections import (
    AttentionConfig,
    CheckpointConfig,
    ClusterConfig,
    CommConfig,
    DataConfig,
    EngineConfig,
    InitConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Config:
    """Defines everything about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def local_heads(self) -> tuple[int, int]:
        """Counts query and key/value heads of one rank; of fewer key/value heads than ranks, each rank has one."""
        tp = self.parallel.tp
        return self.model.heads // tp, max(1, self.model.kv_heads // tp)

    @property
    def linear_strategy(self) -> str:
        """Names who moves the states of linear layers; a strategy of softmax layers leaves it to the first of them."""
        attention = self.attention
        named = attention.strategy if attention.strategy in LINEAR_STRATEGIES else next(iter(LINEAR_STRATEGIES))
        return attention.linear or named

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Config:
        """Returns the configuration that a plain nested mapping states, checked; absent keys keep their defaults."""
        config = parse(cls, mapping)
        config.check()
        return config

    @classmethod
    def from_run(cls, mapping: Mapping[str, Any]) -> Config:
        """Returns the configuration that a run's own file states, also one that an earlier version wrote."""
        return cls.from_dict(translated(mapping) if isinstance(mapping, Mapping) else mapping)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plain nested mapping that ``from_dict`` reads back."""
        return as_dict(self)

    def check(self) -> None:
        """Applies every rule that needs no world size."""
        for one in fields(self):
            getattr(self, one.name).check()
        for rule in RULES:
            rule(self)
