"""Builds AdamW, and a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from longctx.catalog import OPTIMIZERS
from longctx.config import OptimConfig
from longctx.errors import StorageError


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


class WarmupCosine:
    """Raises the learning rate linearly, then lets it fall by a cosine.

    It reaches ``lr`` after ``warmup_steps`` and ``min_lr_ratio * lr`` at ``steps``. Its only state is how many steps
    are done.
    """

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self._config = config
        self._steps = steps
        self.done = 0

    def rate(self, step: int) -> float:
        """Computes the learning rate of step ``step``, counted from 1."""
        config = self._config
        if step <= config.warmup_steps:
            return config.lr * step / config.warmup_steps
        falling = max(1, self._steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / falling)
        ratio = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.lr * ratio

    def advance(self) -> float:
        """Counts the next step and returns its learning rate."""
        self.done += 1
        return self.rate(self.done)

    def state_dict(self) -> dict[str, int]:
        """Returns how many steps are done."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the schedule go on after the steps that a checkpoint counts."""
        done = state.get("done")
        if type(done) is not int or done < 0:
            raise StorageError(f"the schedule in the checkpoint is damaged: done={done!r}, must be a count of steps")
        self.done = done
