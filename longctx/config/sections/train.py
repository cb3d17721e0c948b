"""Configures the step: its arithmetic, its batch, its optimizer, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longctx.catalog import OPTIMIZERS, SCHEDULES
from longctx.config.readers import for_some, refuse_unread
from longctx.errors import ConfigError
from longctx.rules import above, at_least, one_of, within

DTYPES = ("float32", "bfloat16", "float64")
RECOMPUTE = ("none", "selective", "full")
LONGEST_WARMUP = 2000  # steps, of one that is left out: Llama 2's
KEEPABLE = ("attention", "attention_half", "products", "collectives")


@dataclass(frozen=True)
class TrainConfig:
    """Configures the step: how many, in which arithmetic, over which batch."""

    steps: int = 100
    seed: int = 0
    dtype: str = "float32"  # float32, bfloat16 (fp32 master weights and reductions) or float64
    global_batch: int = 4  # sequences per optimizer step, the same data for every mesh
    micro_batch: int = 1  # sequences per forward pass of one data-parallel group
    recompute: str = "none"  # none, selective (keeps attention, products, collectives) or full (keeps attention)
    recompute_keep: tuple[str, ...] | None = (
        None  # what full keeps instead; []: nothing, attention is run again; attention_half: half of it
    )
    mlp_chunk: int | None = None  # tokens whose MLP intermediates exist at one time; null: all
    loss_chunk: int = 1024  # tokens whose logits exist at one time
    offload: bool = False  # what recompute keeps waits for the backward pass in host memory
    compile: bool = False
    deterministic: bool = False
    canary: bool = True  # compare one tiny step with the dense single-device step before training

    def check(self) -> None:
        """Refuses counts below one and names that stand for nothing."""
        one_of("train.dtype", self.dtype, DTYPES)
        one_of("train.recompute", self.recompute, RECOMPUTE)
        at_least("train.seed", self.seed, 0)
        for name in ("steps", "global_batch", "micro_batch", "loss_chunk", "mlp_chunk"):
            at_least(f"train.{name}", getattr(self, name), 1)
        self._check_memory_levers()

    def _check_memory_levers(self) -> None:
        for name in self.recompute_keep or ():
            one_of("train.recompute_keep", name, KEEPABLE)
        if self.recompute_keep is not None and self.recompute != "full":
            raise ConfigError(
                f"train.recompute_keep=[{','.join(self.recompute_keep)}] says what train.recompute=full keeps, got "
                f"train.recompute={self.recompute}; set train.recompute=full, or train.recompute_keep=null"
            )
        if {"attention", "attention_half"} <= set(self.recompute_keep or ()):
            raise ConfigError(
                "train.recompute_keep names attention, which keeps all of its outputs, and attention_half, which keeps "
                "half of them; leave one out"
            )
        if self.offload and self.recompute == "none":
            raise ConfigError(
                "train.offload=true moves what recompute keeps, and train.recompute=none recomputes nothing; "
                "nearest valid: train.recompute=selective"
            )
        half = "[attention_half]" if "attention_half" in (self.recompute_keep or ()) else None
        levers = (("mlp_chunk", self.mlp_chunk), ("offload", self.offload or None), ("recompute_keep", half))
        for name, value in levers:
            if self.compile and value is not None:
                raise ConfigError(
                    f"train.{name}={str(value).lower()} does not go into the one graph of a block that "
                    f"train.compile=true makes; set train.compile=false, or leave train.{name} out"
                )


@dataclass(frozen=True)
class OptimConfig:
    """Configures the optimizer, and a learning rate that warms up linearly and then follows a schedule."""

    name: str = "adamw"
    lr: float = 3e-3
    schedule: str = "cosine"  # after warm-up: cosine, wsd (constant, then a decay at the run's end) or constant
    warmup_steps: int | None = None  # null: a tenth of the run, or of its cosine, and at most 2,000
    decay_steps: int | None = for_some(
        None
    )  # cosine: its end, null: train.steps; wsd: length of its decay, null: a tenth
    min_lr_ratio: float = for_some(0.1)  # of lr, at the end of the decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0

    def check(self) -> None:
        """Refuses numbers with which the optimizer cannot step."""
        OPTIMIZERS.require(self.name)
        above("optim.lr", self.lr, 0.0)
        within("optim.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        within("optim.beta1", self.beta1, 0.0, 1.0, open_end=True)
        within("optim.beta2", self.beta2, 0.0, 1.0, open_end=True)
        SCHEDULES.require(self.schedule)
        at_least("optim.decay_steps", self.decay_steps, 1)
        refuse_unread(self, "optim", SCHEDULES, self.schedule, "optim.schedule")
        above("optim.eps", self.eps, 0.0)
        at_least("optim.weight_decay", self.weight_decay, 0.0)
        above("optim.grad_clip", self.grad_clip, 0.0)

    def settled(self, steps: int) -> OptimConfig:
        """Returns the section with what null stands for in a run of ``steps`` steps.

        It is recorded, so that a run of more steps keeps the schedule that it was begun with.
        """
        decay, whole = SCHEDULES.load(self.schedule).settle(self.decay_steps, steps)
        warmup = min(LONGEST_WARMUP, whole // 10) if self.warmup_steps is None else self.warmup_steps
        return replace(self, warmup_steps=warmup, decay_steps=decay)


@dataclass(frozen=True)
class CheckpointConfig:
    """Says when state is written and how much of it is kept."""

    every: int = 0  # steps between checkpoints; 0: not by steps
    every_minutes: float | None = 10.0  # minutes after which the next step is followed by a checkpoint; 0, null: never
    at_end: bool = True
    keep: int = 3  # newest committed checkpoints to keep; 0: all

    def check(self) -> None:
        """Refuses negative counts."""
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.every_minutes", self.every_minutes, 0)
        at_least("checkpoint.keep", self.keep, 0)
