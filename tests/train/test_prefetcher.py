"""Batches read and planned while the step before them runs."""

import threading

import pytest
import torch

from longctx.attention.strategies.disaggregated import dispatch
from longctx.attention.strategies.disaggregated import prepared as disaggregated
from longctx.data.loader import Loader
from longctx.data.packing import Packing
from longctx.errors import DataError
from longctx.launcher import build
from longctx.mesh import build_mesh
from longctx.planner import RankPlan
from longctx.reporting.meter import Meter
from longctx.sequence import Contiguous, Mask
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from longctx.train.prefetcher import Prefetcher
from tests.train.small_run import CPU, Recorder, corpus, small_config, train_on_sim


def loader_and_sharder():
    loader = Loader(Packing(corpus(), seq_len=61, seed=3), global_batch=4, micro_batch=2)
    return loader, BatchSharder(Contiguous(), Mask(), rank=1, size=3, device=CPU)


def threads_ahead():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_batches_are_those_of_the_loader_in_its_order():
    (loader, border), (other, _) = loader_and_sharder(), loader_and_sharder()
    ahead = Prefetcher(loader, border, lambda plans: None)
    for step in range(5):
        taken = ahead.take(more=step < 4)
        expected = [border(batch) for batch in next(other)]
        assert len(taken) == len(expected) == 2
        for one, two in zip(taken, expected, strict=True):
            assert torch.equal(one.tokens, two.tokens)
            assert torch.equal(one.labels, two.labels) and torch.equal(one.positions, two.positions)
    ahead.close()
    assert not threads_ahead()


def test_the_position_is_that_of_the_batches_that_were_taken():
    loader, border = loader_and_sharder()
    planned = threading.Semaphore(0)
    ahead = Prefetcher(loader, border, lambda plans: planned.release())
    for step in range(3):
        ahead.take(more=True)
        assert planned.acquire(timeout=30) and (step or planned.acquire(timeout=30)), "the next one is planned already"
        assert loader.state_dict()["next_sample"] == 4 * (step + 1)
    loader.load_state_dict({**loader.state_dict(), "next_sample": 40})
    (taken, _), (expected, _) = ahead.take(more=False), loader.batches(40)
    assert torch.equal(taken.tokens, border(expected).tokens)
    ahead.close()


def test_what_goes_wrong_ahead_is_raised_when_its_step_comes(monkeypatch):
    loader, border = loader_and_sharder()
    batches = loader.batches
    monkeypatch.setattr(loader, "batches", lambda first: batches(first) if first < 8 else refuse())

    def refuse():
        raise DataError("id 300 is outside the vocabulary")

    ahead = Prefetcher(loader, border, lambda plans: None)
    ahead.take(more=True)
    ahead.take(more=True)
    with pytest.raises(DataError, match="id 300"):
        ahead.take(more=True)
    assert loader.next_sample == 8, "a step that was not made is not used"
    ahead.close()


def shared(directory, **sections):
    return small_config(
        directory,
        parallel={"sp": 2},
        attention={"strategy": "disaggregated", "layout": None, "ping_pong": True},
        train={"steps": 3, "global_batch": 4, "micro_batch": 2},
        **sections,
    )


def test_nothing_is_planned_inside_a_step(tmp_path, monkeypatch):
    """Neither plans of either half, nor rows of any rank, nor tiles of one's own."""
    seen = []

    def spied(module, name):
        real = getattr(module, name)

        def spy(*args, **kwargs):
            seen.append((name, threading.current_thread().name))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    spied(disaggregated, "planned")
    spied(dispatch, "_tiles")
    spied(RankPlan, "of")
    train_on_sim(shared(tmp_path))
    # Three steps of two micro-batches of two halves, planned by one of the two ranks that share the process.
    assert [name for name, _ in seen].count("planned") == 3 * 2 * 2
    assert {name for name, _ in seen} == {"planned", "_tiles", "of"}
    assert all(thread.startswith("ahead") for _, thread in seen), "planned while a layer waited"
    assert not threads_ahead()


def test_numbers_do_not_depend_on_when_it_was_planned(tmp_path, monkeypatch):
    ahead, _ = train_on_sim(shared(tmp_path / "ahead"))
    monkeypatch.setattr(build, "prepare_of", lambda config, mesh: lambda plans: None)
    at_first_use, _ = train_on_sim(shared(tmp_path / "first_use"))
    assert ahead == at_first_use


def failing(config):
    trainer = build.build_trainer(config, None, corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU))
    trainer.sink = recorder = Recorder()
    calls = iter(range(9))

    def prepare(plans):
        if next(calls) == 2:
            raise RuntimeError("no plan for the third step")

    trainer.prefetcher._prepare = prepare
    with pytest.raises(RuntimeError, match="third step"):
        trainer.run()
    return trainer.state.step, recorder.summary["outcome"], trainer.state.loader.next_sample


def test_a_run_whose_plans_fail_ends_and_says_so(tmp_path):
    assert Cluster(2).run(failing, shared(tmp_path)) == [(2, "failed", 8)] * 2
    assert not threads_ahead()
