"""The schedule is a function of the step; norms do not decay."""

import pytest
import torch

from longctx.config import OptimConfig
from longctx.errors import StorageError
from longctx.model import Decoder
from longctx.train.optimizer import WarmupCosine, build_optimizer
from tests.train.small_run import MODEL


def test_warm_up_is_linear_and_the_cosine_ends_at_the_floor():
    schedule = WarmupCosine(OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1), steps=24)
    assert [schedule.rate(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert schedule.rate(14) == pytest.approx(0.55)
    assert schedule.rate(24) == pytest.approx(0.1)
    assert schedule.rate(1000) == pytest.approx(0.1)
    rates = [schedule.rate(step) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("warmup,steps", [(0, 5), (5, 5), (9, 5), (0, 1)])
def test_any_lengths_give_usable_rates(warmup, steps):
    schedule = WarmupCosine(OptimConfig(lr=1.0, warmup_steps=warmup), steps)
    assert all(0 < schedule.advance() <= 1.0 for _ in range(steps))


def test_it_resumes_where_it_was():
    one, other = (WarmupCosine(OptimConfig(), 50) for _ in range(2))
    for _ in range(7):
        one.advance()
    other.load_state_dict(one.state_dict())
    assert one.advance() == other.advance()
    with pytest.raises(StorageError, match="damaged"):
        other.load_state_dict({"done": "7"})


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
