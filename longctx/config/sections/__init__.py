"""Defines the sections of a configuration, each with the rules that look at it alone.

A field means what the user set. Every rule names the value, itself and a valid choice.
"""

from longctx.config.sections.attention import AttentionConfig
from longctx.config.sections.cluster import ClusterConfig
from longctx.config.sections.data import DataConfig
from longctx.config.sections.model import ModelConfig
from longctx.config.sections.parallel import CommConfig, ParallelConfig
from longctx.config.sections.run import EngineConfig, InitConfig, LoggerConfig, RunConfig
from longctx.config.sections.train import CheckpointConfig, OptimConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CommConfig",
    "DataConfig",
    "EngineConfig",
    "InitConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
]
