"""A run that diverges leaves a checkpoint from before, and says from which step to go on."""

import math
from pathlib import Path

import pytest

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.engines.native import NativeEngine
from longctx.errors import NumericsError
from longctx.launcher import build
from longctx.launcher.resuming import Resume
from tests.checkpoint.checkpoint_run import make, saved, train
from tests.train.small_run import corpus, small_config


def steps(directory):
    return sorted(path.name for path in Path(directory).iterdir() if path.is_dir())


def run(directory, monkeypatch, bad=(), resume=None, last=8, **checkpoint):
    """A run in which the loss of some of them, counted in this process, is not finite."""
    config = small_config(directory, train={"steps": last}, checkpoint={"at_end": True, **checkpoint})
    taken, accumulate = [0], NativeEngine.accumulate

    def accumulated(self, *arguments):
        taken[0] += 1
        loss = accumulate(self, *arguments)
        return loss * math.nan if taken[0] in bad else loss

    with monkeypatch.context() as patch:
        patch.setattr(build, "open_corpus", lambda *args, **kwargs: corpus())
        patch.setattr(NativeEngine, "accumulate", accumulated)
        build.run_sim(config, resume)


@pytest.mark.parametrize("keep", [1, 2])
def test_what_diverged_is_set_aside_and_the_run_goes_on_from_before(tmp_path, monkeypatch, keep):
    # The fourth update ruins the weights, which the three steps after it show.
    words = "step 4 was written on the way and is set aside; --resume goes on from step 3"
    with pytest.raises(NumericsError, match=words):
        run(tmp_path, monkeypatch, bad=(5, 6, 7), every=1, keep=keep)
    assert steps(tmp_path / "checkpoints") == [".diverged-step-4", "step-3"]
    run(tmp_path, monkeypatch, resume=Resume(required=True), every=1, keep=keep)
    # Of the last one no step has shown yet that it is sound, so one more stays than is kept else.
    assert steps(tmp_path / "checkpoints") == ["step-7", "step-8"]


def test_no_checkpoint_is_written_while_steps_are_not_finite(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, bad=(2, 4, 5), every=2, keep=0)
    assert steps(tmp_path / "checkpoints") == ["step-3", "step-6", "step-8"]


def test_a_checkpoint_that_was_gone_on_from_is_not_set_aside(tmp_path, monkeypatch):
    """Nobody knows whether it or the new configuration is to blame; an earlier one is named."""
    run(tmp_path, monkeypatch, every=1)
    words = "no step on the weights of step 8, which it went on from, was finite; --resume --step 7 goes on"
    with pytest.raises(NumericsError, match=words):
        run(tmp_path, monkeypatch, bad=(1, 2, 3), resume=Resume(required=True), last=12, every=1)
    assert steps(tmp_path / "checkpoints") == ["step-6", "step-7", "step-8"]


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_tensor_that_is_not_finite_is_never_saved(tmp_path, part):
    saved(tmp_path, 2)
    checkpointer, state = Checkpointer(tmp_path, keep=1), make(None)
    checkpointer.load(state)
    train(state, 1)
    weight = state.model.one.weight
    tensor = weight.detach() if part == "weights" else state.optimizer.state[weight]["exp_avg_sq"]
    tensor.view(-1)[3] = math.inf
    with pytest.raises(NumericsError, match=r"step 3: (model|optimizer)\.one\.weight.* is not finite"):
        checkpointer.save(3, state)
    assert steps(tmp_path) == ["step-1", "step-2"]
    tensor.view(-1)[3] = 1e30
    checkpointer.save(3, state)


def test_minutes_are_those_of_the_first_rank_since_the_last_save(tmp_path, monkeypatch):
    for minutes, expected in ((1e-9, [f"step-{step}" for step in range(1, 9)]), (0, ["step-8"]), (None, ["step-8"])):
        run(tmp_path / str(minutes), monkeypatch, every_minutes=minutes, keep=0)
        assert steps(tmp_path / str(minutes) / "checkpoints") == expected
