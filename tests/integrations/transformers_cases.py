"""Runs a ``transformers`` model whole and cut, on the same batch, so that tests compare logits, loss and gradients."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longctx.attention import StrategyOptions
from longctx.huggingface.reference.dtype import in_model_dtype, make_tables
from longctx.integrations.transformers import register
from longctx.sequence import unshard
from longctx.sim import Cluster
from tests.huggingface.small_models import published


@dataclass(frozen=True)
class Outcome:
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def model_of(name: str, dtype: torch.dtype, attention: str) -> Any:
    """A copy of a family's small model."""
    model = copy.deepcopy(published(name)).to(dtype)
    model.set_attn_implementation(attention)
    return model.train()


def computing(dtype: torch.dtype) -> Any:
    """Takes transformers' parts in fp32 to fp64 with the rest; in fp32 it changes nothing."""
    return in_model_dtype(dtype) if dtype is torch.float64 else nullcontext()


def whole(name: str, dtype: torch.dtype, tokens: Tensor, **given: Any) -> Outcome:
    """One process of transformers' own; ``labels`` hold -100 where a document begins."""
    model = model_of(name, dtype, "eager")
    labels = given.pop("labels")
    with computing(dtype):
        if dtype is torch.float64:
            make_tables(model, tokens.shape[1])
        logits = model(input_ids=tokens, use_cache=False, **given).logits
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return Outcome(logits.detach(), loss.detach(), gradients_of(model))


def shared(
    name: str,
    dtype: torch.dtype,
    world: int,
    strategy: str,
    layout: str,
    tokens: Tensor,
    options: StrategyOptions = StrategyOptions(),  # noqa: B008 - it is frozen
    **given: Any,
) -> Outcome:
    """The same on a simulated sequence group; gradients are summed by our own helper."""

    def rank() -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
        sequence = register(dist.group.WORLD, strategy, layout, options=options)
        model = model_of(name, dtype, "longctx")
        sequence.adopt(model)
        with computing(dtype):
            if dtype is torch.float64:
                make_tables(model, tokens.shape[1])
            cut = sequence.shard(tokens, **given)
            logits = model(**cut.inputs).logits
            loss = sequence.loss(logits, cut)
            loss.backward()
        sequence.sum_gradients(model)
        return logits.detach(), cut.plan, loss.detach(), gradients_of(model)

    ranks = Cluster(world, trace=False).run(rank)
    for other in ranks[1:]:
        assert torch.equal(other[2], ranks[0][2])
        assert all(torch.equal(other[3][key], ranks[0][3][key]) for key in ranks[0][3])
    return Outcome(unshard([one[0] for one in ranks], ranks[0][1]), ranks[0][2], ranks[0][3])


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(one: Outcome, other: Outcome, tokens: Tensor | None = None) -> dict[str, float]:
    """How far two outcomes are apart, in norms; ``tokens``: which of them count, bool ``[B, S]``."""
    kept = slice(None) if tokens is None else tokens
    errors = {"logits": _apart(one.logits[kept], other.logits[kept]), "loss": _apart(one.loss, other.loss)}
    assert one.gradients.keys() == other.gradients.keys()
    # Biases of keys have no gradient but rounding: so all are measured against the whole model's.
    size = torch.stack([g.norm() for g in other.gradients.values()]).norm()
    floor = 1e-2 * size / len(other.gradients) ** 0.5
    for name, own in one.gradients.items():
        wanted = other.gradients[name]
        errors[name] = float((own - wanted).norm() / torch.maximum(wanted.norm(), floor))
    return errors


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
