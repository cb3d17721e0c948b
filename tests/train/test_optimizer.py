"""Norms do not decay."""

import torch

from longctx.config import OptimConfig
from longctx.model import Decoder
from longctx.train.optimizer import build_optimizer
from tests.train.small_run import MODEL


def test_only_matrices_decay():
    model = Decoder(MODEL)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    before = model.norm.weight.detach().clone()
    model.norm.weight.grad = torch.zeros_like(model.norm.weight)
    optimizer.step()
    assert torch.equal(before, model.norm.weight)
