"""Activation recompute: a block's activations are computed again in the backward pass instead of being kept.

What is kept is a list of names. With `attention` among them, the outputs (out, lse) of every operator of ours are kept,
and recompute neither runs attention nor communicates again. Without it, it does both. Of an `attention_half` the later
half of each rank's rows is kept: recompute runs the earlier half. Under a balanced layout its queries see half of the
keys. So for half of the memory a quarter of the causal work is done twice (BurstEngine, Sun et al. 2025,
"sequence-level selective checkpointing", there for the striped layout). What tensor parallelism sends inside a block is
repeated unless `collectives` are kept.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from longctx.attention.runtime.operator import COMPLETIONS, tail_of
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
    "attention_half": lambda operator: operator.namespace == ATTENTION_NAMESPACE,
    "products": lambda operator: operator in MATRIX_PRODUCTS,
    "collectives": lambda operator: operator.namespace == COLLECTIVES_NAMESPACE,
}


def keeps(kept: tuple[str, ...], operator: Any) -> bool:
    """Returns whether the results of an operator are kept.

    Of a tile of the MLP nothing is: its backward runs it anyway.
    """
    return not in_tile() and any(KINDS[name](operator) for name in kept)


def halves(kept: tuple[str, ...], operator: Any) -> bool:
    """Returns whether only the later half of an operator's results is kept."""
    return "attention_half" in kept and operator in COMPLETIONS


def names_kept(mode: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the ``KINDS`` that are kept: those that are listed, or without a list those of the mode."""
    return KEPT[mode] if names is None else names


def recompute_activations(model: Decoder, kept: tuple[str, ...]) -> None:
    """Makes every block of a model recompute its activations, but those of the kinds in ``kept``.

    The checkpoint goes inside the block's ``forward``, not around the module. FSDP2's hooks stay outside of it, so
    parameters are gathered for the backward pass once, as without recompute.
    """
    for block in model.layers:
        block.forward = checkpointed(block.forward, contexts_of(kept))  # type: ignore[method-assign]


def contexts_of(kept: tuple[str, ...]) -> Contexts:
    """Returns what a block is run under in the forward pass and when it is recomputed."""
    if not kept:
        return noop_context_fn
    if "attention_half" in kept:
        return partial(own_contexts, kept, _detached, _detached)

    def policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keeps(kept, operator) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def checkpointed(forward: Callable[..., Tensor], contexts: Contexts) -> Callable[..., Tensor]:
    """Makes ``forward`` keep what ``contexts`` say.

    Blocks draw no random numbers, so no state of theirs is kept.
    """
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


Store = dict[Any, deque[Any]]  # results of each operator, in the order of its calls


def own_contexts(
    kept: tuple[str, ...], pack: Callable[[Tensor], Any], unpack: Callable[[Any], Any]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Returns contexts that keep packed results of operators, in place of torch's.

    Torch's hold what operators return themselves: whole, and where no hook for saved tensors sees it. Between ``pack``
    and ``unpack`` a result is whatever ``pack`` makes of it.
    """
    store: Store = defaultdict(deque)
    return KeepOutputs(kept, store, pack), ReturnKept(kept, store, unpack)


class KeepOutputs(TorchDispatchMode):
    """Packs, in the forward pass, the results of operators that ``keeps`` names, or the later half of them."""

    def __init__(self, kept: tuple[str, ...], store: Store, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._kept, self._store, self._pack = kept, store, pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _distributed(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if keeps(self._kept, func) and not _fake(types):
            stays = func.namespace == COLLECTIVES_NAMESPACE
            kept = tail_of(*result, *args[3:5]) if halves(self._kept, func) else result
            self._store[func].append(tree_map(_detached if stays else self._packed, kept))
        return result

    def _packed(self, leaf: Any) -> Any:
        return self._pack(leaf.detach()) if isinstance(leaf, Tensor) else leaf


class ReturnKept(TorchDispatchMode):
    """Returns, in the recompute, what ``KeepOutputs`` packed in place of running the operator.

    Where only the later half was kept, it computes the earlier one.
    """

    def __init__(self, kept: tuple[str, ...], store: Store, unpack: Callable[[Any], Any]) -> None:
        super().__init__()
        self._kept, self._store, self._unpack = kept, store, unpack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _distributed(types):
            return NotImplemented
        if keeps(self._kept, func) and not _fake(types):
            kept = tree_map(self._unpack, self._store[func].popleft())
            return COMPLETIONS[func](*args[:3], *kept, *args[3:]) if halves(self._kept, func) else kept
        return func(*args, **(kwargs or {}))


def _distributed(types: Any) -> bool:
    """DTensors take apart what they are asked, and the mode sees the parts."""
    return any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types)


def _fake(types: Any) -> bool:
    """What DTensors ask once to learn of shapes is not part of the block's work."""
    return any(issubclass(kind, FakeTensor) for kind in types)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
