"""Recomputing a block's activations in the backward pass instead of keeping them.

Attention is never part of it: the outputs (out, lse) of every operator of ours are kept, so recompute
neither runs attention nor sends its traffic again. What tensor parallelism sends inside a block is repeated
under ``full``, whose point is memory, and kept under ``selective``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx.model import Decoder

ATTENTION_NAMESPACE = "longctx"
COLLECTIVES_NAMESPACE = "_c10d_functional"
# What `selective` keeps besides: the outputs that are dear to compute.
MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
)


def keep_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """``full``: only what attention returned is kept."""
    if operator.namespace == ATTENTION_NAMESPACE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """``selective``: attention, matrix products and collectives are kept, the cheap rest is recomputed."""
    if operator.namespace in (ATTENTION_NAMESPACE, COLLECTIVES_NAMESPACE) or operator in MATRIX_PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {"full": keep_attention, "selective": keep_products}


def recompute_activations(model: Decoder, mode: str) -> None:
    """``mode``: none, selective or full.

    The checkpoint goes inside the block's ``forward``, not around the module: FSDP2's hooks stay outside of
    it, so parameters are gathered for the backward pass once, as without recompute.
    """
    if mode == "none":
        return
    for block in model.layers:
        block.forward = checkpointed(block.forward, POLICIES[mode])  # type: ignore[method-assign]


def checkpointed(forward: Callable[..., Tensor], policy: Callable[..., CheckpointPolicy]) -> Callable[..., Tensor]:
    """``forward`` that keeps what ``policy`` says; blocks draw no random numbers, so no state of theirs."""
    return partial(
        checkpoint,
        forward,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
