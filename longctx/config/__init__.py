"""Defines the configuration of a run: the tree, its strict reading, and every rule about it."""

from longctx.config.resolve import DEGREES, resolve, simulated_world_size
from longctx.config.schema import Config
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

__all__ = [
    "DEGREES",
    "AttentionConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CommConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "InitConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "resolve",
    "simulated_world_size",
]
