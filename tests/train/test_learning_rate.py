"""The rate is a pure function of the step and of what is recorded; more steps never raise it unasked."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.catalog import SCHEDULES
from longctx.config import Config, OptimConfig, TrainConfig, resolve
from longctx.errors import ConfigError, StorageError
from longctx.train.learning_rate import LearningRate, told


def rates(config, steps, last=None):
    rate = LearningRate(config, steps)
    return [rate.rate(step) for step in range(1, (last or steps) + 1)]


def test_the_cosine_reaches_its_floor_where_it_ends_and_stays_there():
    rate = LearningRate(OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1), steps=24)
    assert [rate.rate(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert [rate.rate(step) for step in (14, 24, 1000)] == pytest.approx([0.55, 0.1, 0.1])


def test_wsd_is_constant_and_falls_in_a_straight_line_at_the_runs_end():
    found = rates(OptimConfig(schedule="wsd", lr=1.0, warmup_steps=2, decay_steps=4, min_lr_ratio=0.0), 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_constant_stays():
    assert rates(OptimConfig(schedule="constant", lr=1.0, warmup_steps=2), 5) == [0.5, 1, 1, 1, 1]


@settings(max_examples=200)
@given(
    schedule=st.sampled_from(list(SCHEDULES)),
    steps=st.integers(1, 400),
    warmup=st.none() | st.integers(0, 400),
    decay=st.none() | st.integers(1, 500),
    floor=st.floats(0, 1),
)
def test_any_lengths_give_rates_that_rise_once_and_then_never_again(schedule, steps, warmup, decay, floor):
    reads = SCHEDULES.load(schedule).reads
    chosen = {"decay_steps": decay, "min_lr_ratio": floor} if reads else {}
    config = OptimConfig(schedule=schedule, lr=1.0, warmup_steps=warmup, **chosen)
    config.check()
    found = rates(config, steps, steps + 50)
    top = found.index(max(found))
    assert all(0 <= rate <= 1 for rate in found) and (floor == 0 or found[0] > 0)
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:], reverse=True)
    # What is recorded gives the same rates again, and only wsd asks for the run's steps.
    settled = config.settled(steps)
    settled.check()
    assert rates(settled, steps, steps + 50) == found and settled.settled(steps) == settled
    if schedule != "wsd":
        assert rates(settled, 2 * steps, steps + 50) == found


def test_what_is_left_out_is_a_tenth():
    assert OptimConfig().settled(100) == OptimConfig(warmup_steps=10, decay_steps=100)
    assert OptimConfig().settled(20).warmup_steps == 2 and OptimConfig().settled(5).warmup_steps == 0
    assert OptimConfig().settled(10**6).warmup_steps == 2000
    assert OptimConfig(schedule="wsd").settled(100) == OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=10)
    assert OptimConfig(schedule="constant").settled(100).decay_steps is None


def test_a_resolved_run_keeps_its_end_when_it_gets_more_steps():
    run = resolve(Config(train=TrainConfig(steps=24)), 1)
    longer = resolve(replace(run, train=replace(run.train, steps=48)), 1)
    assert longer.optim == run.optim
    assert rates(longer.optim, 48)[23:] == pytest.approx([3e-4] * 25)
    asked = replace(longer, optim=replace(longer.optim, decay_steps=None))
    assert resolve(asked, 1).optim.decay_steps == 48


def test_a_run_of_an_earlier_version_keeps_the_end_of_its_cosine():
    old = {"optim": {"warmup_steps": 20}, "train": {"steps": 24}}
    assert Config.from_run(old).optim.decay_steps == 24
    assert Config.from_run({"optim": {"schedule": "constant"}, "train": {"steps": 24}}).optim.decay_steps is None


@pytest.mark.parametrize("field", ["decay_steps", "min_lr_ratio"])
def test_a_decay_without_one_is_refused(field):
    with pytest.raises(ConfigError, match=f"optim.{field}.*constant.*cosine or wsd"):
        OptimConfig(schedule="constant", **{field: 1}).check()


@pytest.mark.parametrize(
    ("config", "steps", "words"),
    [
        ({}, 240, "lr: warm-up to 0.003 at step 24, cosine to 0.0003 at step 240"),
        ({"warmup_steps": 0}, 5, "lr: 0.003 from step 1, cosine to 0.0003 at step 5"),
        (
            {"warmup_steps": 20, "decay_steps": 240},
            480,
            "lr: warm-up to 0.003 at step 20, cosine to 0.0003 at step 240, then constant to step 480; "
            "optim.decay_steps=480 would end it there",
        ),
        ({"decay_steps": 200}, 100, "cosine to 0.0003 at step 200, of which step 100, the last, has 0.00188"),
        ({"schedule": "wsd"}, 100, "warm-up to 0.003 at step 10, constant to step 90, wsd to 0.0003 at step 100"),
        ({"schedule": "constant"}, 100, "lr: warm-up to 0.003 at step 10, then constant"),
    ],
)
def test_what_the_rate_will_do_is_told_in_one_line(config, steps, words):
    line = told(OptimConfig(**config), steps)
    assert words in line and "\n" not in line


def test_it_resumes_where_it_was():
    one, other = (LearningRate(OptimConfig(), 50) for _ in range(2))
    for _ in range(7):
        one.advance()
    other.load_state_dict(one.state_dict())
    assert one.advance() == other.advance()
    with pytest.raises(StorageError, match="damaged"):
        other.load_state_dict({"done": "7"})
