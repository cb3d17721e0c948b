"""What was saved on one layout is loaded on any other, bit for bit."""

import datetime
import itertools
import json
import logging
import math

import pytest
import torch
from safetensors import safe_open

from longctx.checkpoint.checkpointer import Checkpointer, TrainState
from longctx.checkpoint.config_record import changed_keys, recorded_config
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.comm import leave_world
from longctx.errors import ConfigError, StorageError
from longctx.sim import RankFailed
from tests.checkpoint.checkpoint_run import LAYOUTS, digest, make, on_cluster, optimizer_of, saved, train


def save_after(shape, directory, steps=1):
    state = make(shape)
    train(state, steps)
    Checkpointer(directory).save(steps, state)
    return digest(state)


def load(shape, directory):
    state = make(shape, seed=99)
    step = Checkpointer(directory).load(state)
    return step, digest(state)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint per layout, and what it must restore."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: (root / name, on_cluster(name, save_after, root / name)[0]) for name in LAYOUTS}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_layout_reads_every_other(checkpoints, source, target):
    directory, expected = checkpoints[source]
    for step, found in on_cluster(target, load, directory):
        assert step == 1
        assert found.same(expected)


def test_a_lone_process_reads_and_writes_without_process_group(checkpoints, tmp_path):
    directory, expected = checkpoints["4"]
    assert load(None, directory)[1].same(expected)
    expected = saved(tmp_path / "alone", 2)[-1]
    assert on_cluster("2", load, tmp_path / "alone")[1][1].same(expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_element_is_written_twice(checkpoints, name):
    directory, expected = checkpoints[name]
    step = directory / "step-1"
    written: dict[str, int] = {}
    for file in step.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                written[key] = written.get(key, 0) + math.prod(tensors.get_slice(key).get_shape())
    generators = {f"rng.{rank}.cpu" for rank in range(LAYOUTS[name][0])}
    assert generators <= set(written)
    assert {key: written[key] for key in set(written) - generators} == {
        **{f"model.{key}": tensor.numel() for key, tensor in expected.weights.items()},
        **{f"optimizer.{key}": tensor.numel() for key, tensor in expected.optimizer.items()},
    }


def interrupted(shape, directory):
    """A run of three steps that saves before each of them, and what resuming from each comes to."""
    checkpointer = Checkpointer(directory, keep=0, layout={"mesh": list(shape)})
    state = make(shape)
    for step in range(3):
        checkpointer.save(step, state)
        train(state, 1)
    whole, ends = (digest(state), torch.rand(3).tolist()), []
    for step in range(3):
        resumed = make(shape, seed=99)
        assert checkpointer.load(resumed, step) == step
        train(resumed, 3 - step)
        ends.append((digest(resumed), torch.rand(3).tolist()))
    return whole, ends


@pytest.mark.parametrize("name", ["1", "2", "2x2"])
def test_a_resumed_run_is_bit_identical_on_the_same_layout(tmp_path, name):
    for (expected, drawn), ends in on_cluster(name, interrupted, tmp_path):
        assert expected.plain[1] == {"next_sample": 12}
        for found, redrawn in ends:
            assert found.same(expected)
            assert redrawn == drawn


def draw_after_load(shape, directory, layout):
    state = make(shape)
    torch.manual_seed(7 + torch.distributed.get_rank())
    Checkpointer(directory, layout=layout).load(state)
    return torch.rand(3).tolist()


def test_generators_are_restored_only_on_the_same_layout(checkpoints, caplog):
    directory, _ = checkpoints["2"]
    fresh = [torch.rand(3, generator=torch.Generator().manual_seed(7 + rank)).tolist() for rank in range(2)]
    with caplog.at_level(logging.WARNING):
        assert on_cluster("2", draw_after_load, directory, {"sp": 2}) == fresh
    assert "random generators start afresh" in caplog.text and "sp 2" in caplog.text
    caplog.clear()
    assert on_cluster("2", draw_after_load, directory, {}) != fresh
    assert "afresh" not in caplog.text


def test_wrappers_leave_no_trace_in_names(tmp_path):
    state = make(None)
    train(state, 1)
    expected = digest(state)
    state.model.one = torch.compile(state.model.one, backend="eager")
    Checkpointer(tmp_path).save(1, state)
    assert load(None, tmp_path)[1].same(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_survive(tmp_path, dtype):
    def build():
        model = torch.nn.Linear(3, 5).to(dtype)
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None, None, 0)

    state, other = build(), build()
    state.model(torch.ones(2, 3, dtype=dtype)).sum().backward()
    state.optimizer.step()
    Checkpointer(tmp_path).save(1, state)
    assert Checkpointer(tmp_path).load(other) == 1
    assert torch.equal(state.model.weight, other.model.weight)
    moment = [s.optimizer.state[s.model.weight]["momentum_buffer"] for s in (state, other)]
    assert moment[0].dtype == dtype and torch.equal(*moment)


def test_saving_changes_nothing_in_the_run(tmp_path):
    plain, saving = make(None), make(None)
    torch.manual_seed(5)
    train(plain, 3)
    torch.manual_seed(5)
    for step in range(3):
        Checkpointer(tmp_path).save(step, saving)
        train(saving, 1)
    assert digest(saving).same(digest(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "two", torch.nn.Linear(5, 7)), r"model\.two\.\w+ is F32 \[6.*makes it F32 \[7"),
        (lambda model: setattr(model, "extra", torch.nn.Linear(2, 2)), r"missing model\.extra\.bias"),
        (lambda model: delattr(model, "gain"), r"unknown here model\.gain"),
        (lambda model: model.double(), r"is F32 .* makes it F64"),
    ],
)
def test_another_model_is_refused_before_anything_is_overwritten(checkpoints, change, message):
    state = make(None, seed=4)
    change(state.model)
    state.optimizer = optimizer_of(state.model)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        Checkpointer(checkpoints["2"][0]).load(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    assert state.step == state.loader.position == 0


def gloo_rank(rank, directory):
    store = torch.distributed.FileStore(str(directory / "store"), 2)
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    try:
        save_after((2,), directory / "checkpoints")
        state = make((2,), seed=99)
        assert Checkpointer(directory / "checkpoints").load(state) == 1
        save_with_one_bad_rank((2,), directory / "failing", bad=1)
    except StorageError as error:
        (directory / f"message-{rank}").write_text(str(error))
    finally:
        leave_world()


@pytest.mark.gloo
def test_real_processes_write_what_simulated_ranks_read(checkpoints, tmp_path):
    torch.multiprocessing.spawn(gloo_rank, (tmp_path,), nprocs=2)
    _, expected = checkpoints["2"]
    for _, found in on_cluster("4", load, tmp_path / "checkpoints"):
        assert found.same(expected)
    messages = {(tmp_path / f"message-{rank}").read_text() for rank in range(2)}
    assert len(messages) == 1 and "rank 1: KeyError" in messages.pop()


def test_other_groups_of_the_optimizer_are_refused(checkpoints):
    state = make(None)
    state.optimizer = torch.optim.AdamW(state.model.parameters())
    with pytest.raises(ConfigError, match="the optimizer had groups of"):
        Checkpointer(checkpoints["1"][0]).load(state)


def test_state_that_is_not_plain_is_refused(tmp_path):
    class Odd:
        def state_dict(self):
            return {"lambda": print}

    state = make(None)
    state.scheduler = Odd()
    with pytest.raises(StorageError, match="builtin_function_or_method"):
        Checkpointer(tmp_path).save(1, state)
    assert CheckpointDirectory(tmp_path).steps() == []
    assert list(tmp_path.iterdir()) == []


def save_with_one_bad_rank(shape, directory, bad):
    state = make(shape)
    if torch.distributed.get_rank() == bad:
        state.optimizer.param_groups[0]["params"] = [torch.zeros(1)]
    Checkpointer(directory).save(1, state)


def message_of_a_save(shape, directory):
    try:
        save_with_one_bad_rank(shape, directory, bad=2)
    except StorageError as error:
        return str(error)
    return None


def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path):
    messages = set(on_cluster("4", message_of_a_save, tmp_path))
    assert len(messages) == 1
    assert "rank 2: KeyError" in messages.pop()
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoints(tmp_path):
    assert Checkpointer(tmp_path / "none").newest() is None
    with pytest.raises(StorageError, match=r"no checkpoint in .*none"):
        Checkpointer(tmp_path / "none").load(make(None))
    with pytest.raises(StorageError, match="step-7 is no committed checkpoint; newest intact earlier one: none"):
        Checkpointer(tmp_path / "none").load(make(None), 7)
    with pytest.raises(RankFailed, match="no checkpoint"):
        on_cluster("2", load, tmp_path / "none")


def test_changes_of_a_configuration_ignore_order(tmp_path):
    assert changed_keys(recorded_config({"a": 1, "b": {"c": (1, 2)}}), {"b": {"c": [1, 2]}, "a": 1}) == {}
    assert changed_keys({"a": 1}, {"a": 2}) == {"a": "a=2 (was 1)"}
    saved(tmp_path, 1)
    state = json.loads((tmp_path / "step-1" / "state.json").read_text())
    assert state["loader"] == {"next_sample": 4}
