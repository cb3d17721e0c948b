"""Recomputing a block's activations in the backward pass instead of keeping them.

What is kept is a list of names. As long as `attention` is one of them, the outputs (out, lse) of every operator
of ours are kept, and recompute neither runs attention nor sends its traffic again; without it, it does both. What
tensor parallelism sends inside a block is repeated unless `collectives` are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from longctx.model import Decoder
from longctx.parallel.tiled_mlp import in_tile

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

ATTENTION_NAMESPACE = "longctx"
COLLECTIVES_NAMESPACE = "_c10d_functional"
# The outputs that are dear to compute.
MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
)
# What the backward pass finds kept.
KEPT = {"full": ("attention",), "selective": ("attention", "products", "collectives")}
KINDS: dict[str, Callable[[Any], bool]] = {
    "attention": lambda operator: operator.namespace == ATTENTION_NAMESPACE,
    "products": lambda operator: operator in MATRIX_PRODUCTS,
    "collectives": lambda operator: operator.namespace == COLLECTIVES_NAMESPACE,
}


def keeps(kept: tuple[str, ...], operator: Any) -> bool:
    """Is what ``operator`` returned kept? Of a tile of the MLP nothing is: its backward runs it anyway."""
    return not in_tile() and any(KINDS[name](operator) for name in kept)


def names_kept(mode: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Of ``KINDS``: those that are listed, or without a list those that the mode stands for."""
    return KEPT[mode] if names is None else names


def recompute_activations(model: Decoder, kept: tuple[str, ...]) -> None:
    """``kept``: names of ``KINDS``.

    The checkpoint goes inside the block's ``forward``, not around the module: FSDP2's hooks stay outside of
    it, so parameters are gathered for the backward pass once, as without recompute.
    """
    for block in model.layers:
        block.forward = checkpointed(block.forward, contexts_of(kept))  # type: ignore[method-assign]


def contexts_of(kept: tuple[str, ...]) -> Contexts:
    """What a block is run under in the forward pass and when it is recomputed."""
    if not kept:
        return noop_context_fn

    def policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keeps(kept, operator) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def checkpointed(forward: Callable[..., Tensor], contexts: Contexts) -> Callable[..., Tensor]:
    """``forward`` that keeps what ``contexts`` say; blocks draw no random numbers, so no state of theirs."""
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
