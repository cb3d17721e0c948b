"""Bounds from below the memory that a rank of a run takes: what is there in every case, and nothing that might not be.

A run that needs more than a device has is refused by it, so it must never say too much. Tests hold it to what
``memory.json`` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.config import Config, ModelConfig
from longctx.config.sections.model import SOFTMAX_KINDS
from longctx.model import Decoder
from longctx.parallel.data import compute_dtype, master_dtype
from longctx.parallel.recompute import names_kept

GIB = 2**30
# Tensors of a parameter's size that an optimizer keeps; of others nothing is claimed.
_STATES = {"adamw": 2}


@dataclass(frozen=True)
class Floor:
    """Holds bytes of one rank: ``weights`` with the optimizer's state, ``gradients``, and ``activations``.

    The last two are not there at one time: the last gradients are made when the activations are gone.
    """

    weights: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Returns the bytes that are in use at one time at least."""
        return self.weights + max(self.gradients, self.activations)


def parameters_of(model: ModelConfig) -> int:
    """Counts the parameters of a model, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(model).parameters())


def memory_floor(config: Config, parameters: int) -> Floor:
    """Returns the memory that the fullest rank of a resolved run takes at least."""
    parallel, train = config.parallel, config.train
    shards = parallel.dp_shard * parallel.sp * parallel.tp * parallel.pp
    own = parameters // shards * master_dtype(train.dtype).itemsize
    # The optimizer has no state before the first update.
    states = _STATES.get(config.optim.name, 0) if train.steps > 1 else 0
    tokens = train.micro_batch * (config.data.seq_len // parallel.sp)
    per_token = sum(_kept_of_token(config, kind) for kind in config.model.kinds)
    return Floor(own * (1 + states), own, int(tokens * per_token / parallel.pp))


def _kept_of_token(config: Config, kind: str) -> float:
    """Returns the bytes that one layer keeps of a token for its backward pass, at least."""
    model, train = config.model, config.train
    if train.offload:
        return 0.0
    width, rows, hidden = model.dim, model.heads * model.head_dim, model.hidden_dim
    keys = 2 * model.kv_heads * model.head_dim
    # Of a linear layer: the gate of what its heads read, and what the projection behind it is given.
    mixed = rows + rows + keys if kind in SOFTMAX_KINDS else 2 * model.linear_heads.values
    if train.recompute == "none":
        values = width + mixed + width
        values += 0 if train.mlp_chunk else 3 * hidden
    else:
        kept = names_kept(train.recompute, train.recompute_keep)
        values = width
        if kind in SOFTMAX_KINDS and "attention" in kept:
            values += rows
        elif kind in SOFTMAX_KINDS and "attention_half" in kept:
            values += rows // 2
        if "products" in kept:
            values += (rows + keys if kind in SOFTMAX_KINDS else 0) + (0 if train.mlp_chunk else 2 * hidden)
    return values * compute_dtype(train.dtype).itemsize / config.parallel.tp
