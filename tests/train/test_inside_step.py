"""A stop inside a long step: what was before it is saved while it runs, and a resumed run is the whole run."""

import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from longctx.checkpoint.store_channel import Closed, StoreChannel
from longctx.engines.native import NativeEngine
from longctx.engines.pipeline import PipelineEngine
from longctx.errors import RequeueError
from longctx.launcher import build
from longctx.launcher.resuming import Resume
from longctx.train import inside_step
from longctx.train.validation import Validation
from tests.train.small_run import CPU, corpus, small_config

RESUME = Resume(required=True)


class Moment:
    """A call in the run at the end of which a stop is asked for, and which takes until the checkpoint is there.

    ``rank``: who takes that long; the others come to the end of their step, or wait for it.
    """

    def __init__(self, directory, saved, rank, call):
        self.committed = Path(directory) / f"checkpoints/step-{saved}"
        self.asked, self.ended = threading.Event(), []
        self._call, self._rank, self._calls = call, rank, 0

    def wrap(self, inner):
        def outer(*arguments, **keywords):
            result = inner(*arguments, **keywords)
            self._calls += dist.get_rank() == self._rank
            if self._calls == self._call and dist.get_rank() == self._rank and not self.asked.is_set():
                self.asked.set()
                until = time.monotonic() + 30
                while not self.committed.exists():
                    assert time.monotonic() < until, "nothing was saved while the step ran"
                    time.sleep(0.01)
            return result

        return outer

    def stopping_by(self, requests, store):
        store = dist.PrefixStore("stop", store)
        return inside_step.Stopping(self.asked.is_set, requests.working, self.ended.append, store, patience=0.05)


def run(config, monkeypatch, resume=None, stopping=None):
    with monkeypatch.context() as patch:
        patch.setattr(build, "open_corpus", lambda *args, **kwargs: corpus())
        patch.setattr(inside_step, "POLL", 0.05)
        patch.setattr(inside_step, "LOOK", 0.02)
        if stopping:
            patch.setattr(build, "stopping_by", stopping)
        build.run_sim(config, resume)


def facts(config):
    lines = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"], line.get("validation_loss")) for line in lines]


def state(config, step):
    folder = Path(config.run.dir) / f"checkpoints/step-{step}"
    return {file.name: file.read_bytes() for file in folder.glob("rank-*")}


STEPS = 4
VALIDATED = {"fraction": 0.1, "every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs without a stop, by their sections."""
    done = {}

    def get(sections):
        key = json.dumps(sections)
        if key not in done:
            done[key] = configured(tmp_path_factory.mktemp("whole"), sections)
            with pytest.MonkeyPatch.context() as patch:
                run(done[key], patch)
        return done[key]

    return get


def configured(directory, sections):
    own = {"train": {"steps": STEPS}, "checkpoint": {"at_end": True}}
    config = small_config(directory, **own, parallel=sections["parallel"])
    if sections.get("validated"):
        config = replace(config, data=replace(config.data, validation=replace(config.data.validation, **VALIDATED)))
    return config


MESHES = {"ring": {"sp": 2}, "shards": {"dp_shard": 2}, "stages": {"pp": 2}}


@pytest.mark.parametrize(
    ("mesh", "where", "name", "rank", "call", "saved"),
    [
        ("ring", NativeEngine, "accumulate", 1, 3, 2),
        ("ring", NativeEngine, "accumulate", 0, 1, 0),  # the first step of the run
        ("ring", NativeEngine, "squared_norm", 0, 4, 3),  # its gradients are there
        ("shards", NativeEngine, "accumulate", 0, 2, 1),
        ("stages", PipelineEngine, "accumulate", 1, 3, 2),
        ("ring", Validation, "__call__", 1, 1, 2),  # a long validation after the second step
    ],
)
def test_what_was_before_a_long_step_is_saved_while_it_runs(
    tmp_path, monkeypatch, whole, mesh, where, name, rank, call, saved
):
    sections = {"parallel": MESHES[mesh], "validated": where is Validation}
    config = configured(tmp_path / "run", sections)
    moment = Moment(config.run.dir, saved, rank, call)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, moment.wrap(getattr(where, name)))
        with pytest.raises(RequeueError, match=rf"saved step {saved} of {STEPS} .* dropped"):
            run(config, patch, stopping=moment.stopping_by)
    assert {error.exit_code for error in moment.ended} == {75}
    assert [step for step, *_ in facts(config)] == list(range(1, saved + 1))
    run(config, monkeypatch, RESUME)
    assert state(config, STEPS) == state(whole(sections), STEPS)
    told, expected = facts(config), facts(whole(sections))
    assert [fact[:4] for fact in told] == [fact[:4] for fact in expected]


class Ranks:
    """Threads that take steps together as ranks do, and drop one of them on a request at a random time."""

    def __init__(self, seed, world, steps):
        self.random = random.Random(seed)
        self.world, self.steps = world, steps
        self.store = dist.HashStore()
        self.asked = [threading.Event() for _ in range(world)]
        self.together = threading.Barrier(world)
        self.saved, self.finished, self.failed = {}, {}, []
        self.channels = [StoreChannel(self.store, rank, world) for rank in range(world)]

    def rank(self, rank):
        pauses = random.Random(self.random.random())
        number = 0

        def save(rest):
            self.saved[rank] = rest.step
            return RequeueError("saved")

        self._as_rank.rank = rank
        stopping = inside_step.Stopping(
            self.asked[rank].is_set, None, lambda error: None, self.store, patience=pauses.random() * 0.01
        )
        inside = inside_step.InsideStep(stopping, replace(REST, step=0), CPU, save, self.settle)
        try:
            for number in range(1, self.steps + 1):
                time.sleep(pauses.random() * 0.004)
                self.together.wait(10)  # gradients are summed
                inside.change()
                time.sleep(pauses.random() * 0.002)
                self.together.wait(10)  # what a step came to is gathered
                inside.rest(replace(REST, step=number), last=number == self.steps)
        except RequeueError:
            return
        except Exception as error:
            self.failed.append(error)
        finally:
            inside.close()
        self.finished[rank] = number

    def settle(self):
        pass


REST = inside_step.StateAtRest({}, None, None, None, {}, 0)


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_save_the_same_step_or_all_finish_whenever_they_are_asked(seed, monkeypatch):
    ranks = Ranks(seed, world=1 + seed % 4, steps=8)
    ranks._as_rank = threading.local()
    monkeypatch.setattr(inside_step, "this_rank", lambda: ranks._as_rank.rank)
    monkeypatch.setattr(inside_step, "world_size", lambda: ranks.world)
    monkeypatch.setattr(inside_step, "POLL", 0.002)
    monkeypatch.setattr(inside_step, "LOOK", 0.001)
    threads = [threading.Thread(target=ranks.rank, args=(rank,)) for rank in range(ranks.world)]
    for thread in threads:
        thread.start()
    time.sleep(ranks.random.random() * 0.06)
    ranks.asked[ranks.random.randrange(ranks.world)].set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "ranks wait for one another"
    assert not ranks.failed
    everyone = set(range(ranks.world))
    assert (set(ranks.saved) == everyone and not ranks.finished) or (set(ranks.finished) == everyone)
    assert len(set(ranks.saved.values())) <= 1


def test_ranks_exchange_bytes_and_the_largest_number_through_a_store():
    store, world = dist.HashStore(), 3
    channels = [StoreChannel(store, rank, world) for rank in range(world)]
    heard = {}

    def talk(rank):
        channels[rank].propose([4, 6, 5][rank])
        payloads = [channels[rank].exchange(bytes([rank, 10, 0]) * size) for size in (0, 1 + rank, 1000)]
        heard[rank] = (channels[rank].largest(), payloads)

    threads = [threading.Thread(target=talk, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    sizes = ([0] * world, [1, 2, 3], [1000] * world)
    expected = [[bytes([rank, 10, 0]) * size for rank, size in enumerate(each)] for each in sizes]
    assert heard == dict.fromkeys(range(world), (6, expected))


def test_nobody_waits_for_a_rank_after_the_channel_is_closed():
    channel = StoreChannel(dist.HashStore(), 0, 2)
    threading.Timer(0.1, channel.close).start()
    with pytest.raises(Closed):
        channel.exchange(b"")
