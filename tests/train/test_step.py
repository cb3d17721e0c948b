"""One optimizer step: what it divides by, what it clips, what it refuses to apply."""

import math
from dataclasses import replace

import pytest
import torch

from longctx.engines.native import NativeEngine
from longctx.errors import NumericsError
from longctx.launcher.build import build_model
from longctx.mesh import build_mesh
from longctx.sequence import IGNORE, Batch, Documents
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from longctx.train.optimizer import build_optimizer
from longctx.train.step import TrainStep
from tests.train.small_run import CPU, small_config

LENGTH = 21


def batch(ignored: slice | None = None, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (1, LENGTH), generator=generator)
    labels = torch.randint(256, (1, LENGTH), generator=generator)
    if ignored:
        labels[0, ignored] = IGNORE
    return Batch(tokens, labels, (Documents.single(LENGTH),))


class Rank:
    """A step function and its model, on one rank of a world."""

    def __init__(self, config, grad_clip=None):
        mesh = build_mesh(config.parallel, "cpu")
        self.mesh = mesh
        self.model = build_model(config, mesh, CPU)
        self.engine = NativeEngine(self.model, build_optimizer(self.model, config.optim))
        self.step = TrainStep(self.engine, mesh, CPU, grad_clip)
        self.border = BatchSharder.of(config, mesh, CPU)

    def weights(self):
        return torch.cat([p.full_tensor().detach().flatten() for p in self.model.parameters()])

    def gradient(self):
        return torch.cat([p.grad.full_tensor().flatten() for p in self.model.parameters()])


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path, attention={"layout": "contiguous"})


def on_ranks(config, sp, function):
    return Cluster(sp).run(function, replace(config, parallel=replace(config.parallel, sp=sp)))


def gradients_with_a_silent_rank(config):
    rank = Rank(config)
    local = rank.border(batch(slice(0, LENGTH // 2)))
    result = rank.step.gradients([local])
    return local.valid_tokens, result, rank.gradient()


def test_a_rank_without_valid_tokens_adds_nothing_and_breaks_nothing(config):
    ((_, expected, right),) = on_ranks(config, 1, gradients_with_a_silent_rank)
    ranks = on_ranks(config, 2, gradients_with_a_silent_rank)
    assert [r[0] for r in ranks] == [0, LENGTH - LENGTH // 2]
    for _, result, gradient in ranks:
        assert result.valid_tokens == expected.valid_tokens
        assert result.loss == pytest.approx(expected.loss, rel=1e-13)
        assert result.grad_norm == pytest.approx(float(right.norm()), rel=1e-12)
        assert float((gradient - right).norm()) < 1e-12


def nothing_valid(config):
    rank = Rank(config)
    before = rank.weights()
    result = rank.step([rank.border(batch(slice(None)))], lr=0.1)
    return result, torch.equal(before, rank.weights()), rank.step.skipped


@pytest.mark.parametrize("sp", [1, 2])
def test_a_batch_without_any_valid_token_is_flagged_and_leaves_weights_alone(config, sp):
    for result, unchanged, skipped in on_ranks(config, sp, nothing_valid):
        assert (result.loss, result.grad_norm, result.valid_tokens) == (None, 0.0, 0)
        assert result.skipped and unchanged
        assert skipped == 0  # nothing was wrong with its numbers


def accumulated(config):
    rank = Rank(config)
    once = rank.step.gradients([rank.border(batch(seed=s)) for s in (0, 1, 2)])
    reduced_once = rank.gradient()
    rank.engine.discard()
    rank.engine._reduce_once = False
    again = rank.step.gradients([rank.border(batch(seed=s)) for s in (0, 1, 2)])
    return once, again, float((rank.gradient() - reduced_once).norm() / reduced_once.norm())


def test_gradients_may_be_reduced_once_or_after_each_micro_batch(config):
    for once, again, error in on_ranks(config, 2, accumulated):
        assert once.loss == again.loss
        assert error < 1e-14


def clipped(config):
    rank = Rank(config, grad_clip=0.01)
    norm = rank.step.gradients([rank.border(batch())]).grad_norm
    seen = []

    def remember() -> None:
        seen.append(float(rank.gradient().norm()))

    rank.engine.optimizer.step = remember
    rank.engine.discard()
    result = rank.step([rank.border(batch())], lr=0.0)
    return norm, result.grad_norm, seen[0]


def test_clipping_is_by_the_global_norm_which_is_reported_unclipped(config):
    for norm, reported, after in on_ranks(config, 2, clipped):
        assert reported == norm > 0.01
        assert after == pytest.approx(0.01, rel=1e-3)


def poisoned(config):
    rank = Rank(config)
    batches = [rank.border(batch())]
    before = rank.weights()
    shard = rank.model.norm.weight.to_local()
    value = shard.clone()
    results = []
    for step, poison in enumerate([True, True, False, True, True, True], start=1):
        with torch.no_grad():
            # One shard of one rank: every rank must come to the same decision.
            shard.copy_(value if not poison or rank.mesh.sequence_rank else math.inf * value)
        try:
            results.append(rank.step(batches, lr=0.0, step=step).skipped)
        except NumericsError as error:
            results.append(str(error))
    with torch.no_grad():
        shard.copy_(value)
    return results, float((rank.weights() - before).norm()), rank.step.skipped


def test_updates_that_are_not_finite_are_skipped_by_all_ranks_and_three_in_a_row_end_the_run(config):
    for results, change, skipped in on_ranks(config, 2, poisoned):
        assert results[:5] == [True, True, False, True, True]
        assert "step 6" in results[5] and "3 steps in a row" in results[5]
        assert change == 0.0
        assert skipped == 5
