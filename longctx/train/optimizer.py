"""Builds the optimizer."""

from __future__ import annotations

import torch
from torch import nn

from longctx.catalog import OPTIMIZERS
from longctx.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer that the configuration names, over the model's parameters."""
    made: torch.optim.Optimizer = OPTIMIZERS.load(config.name)(model, config)
    return made


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds AdamW over the model's parameters; only matrices decay, norms do not.

    The learning rate is set anew at every step. ``foreach`` costs one dispatch of DTensor per operation
    rather than one per operation and parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, foreach=True)
