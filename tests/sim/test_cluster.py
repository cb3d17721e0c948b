"""Runs as a whole: results, failures, deadlocks, random numbers, and what is left behind."""

import random
import signal
import sys
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.sim import Cluster, DeadlockError, RankFailed


def busy_program(rounds: int = 3) -> tuple[list[float], list[int]]:
    """Some of everything, with results that depend on every rank and on random numbers."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    halves = [dist.new_group(list(range(start, world, 2))) for start in range(2)]
    x = torch.randn(4)
    for step in range(rounds):
        arriving = torch.empty(4)
        work = dist.irecv(arriving, (rank - 1) % world, tag=step)
        reduced = x.clone()
        handle = dist.all_reduce(reduced, group=halves[rank % 2], async_op=True)
        dist.send(x, (rank + 1) % world, tag=step)
        work.wait()
        handle.wait()
        x = (x + arriving * reduced + torch.randn(4)).tanh()
        dist.all_reduce(x)
    objects: list[int | None] = [None] * world
    dist.all_gather_object(objects, rank * rank)
    return x.tolist(), objects


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), world=st.sampled_from([2, 3, 4, 7]))
def test_shuffled_hand_over_changes_no_result(seed: int, world: int) -> None:
    plain, shuffled = Cluster(world), Cluster(world, seed=seed)
    assert plain.run(busy_program) == shuffled.run(busy_program)
    assert plain.ledger.by_edge() == shuffled.ledger.by_edge()
    for ours, theirs in zip(plain.trace, shuffled.trace, strict=True):
        assert [event._replace(id=0) for event in ours] == [event._replace(id=0) for event in theirs]


@pytest.mark.parametrize("seed", [None, 5])
def test_runs_repeat_exactly(seed: int | None) -> None:
    cluster = Cluster(4, seed=seed)
    first, trace = cluster.run(busy_program), cluster.trace
    assert cluster.run(busy_program) == first
    assert cluster.trace == trace


def test_a_seed_does_shuffle_the_order() -> None:
    def order_of_arrival(seed: int | None) -> list[int]:
        order: list[int] = []

        def body() -> None:
            for _ in range(5):
                dist.barrier()
                order.append(dist.get_rank())

        Cluster(4, seed=seed).run(body)
        return order

    assert len({tuple(order_of_arrival(seed)) for seed in (None, 1, 2, 3)}) > 2


def test_arguments_results_and_backend_name() -> None:
    def body(base: int, *, factor: int) -> tuple[int, str, int]:
        return base + factor * dist.get_rank(), dist.get_backend(), dist.get_world_size()

    assert Cluster(3).run(body, 10, factor=2) == [(10, "sim", 3), (12, "sim", 3), (14, "sim", 3)]


def test_world_of_sixteen() -> None:
    assert len({tuple(result[0]) for result in Cluster(16).run(busy_program)}) == 1


def test_each_rank_has_its_own_random_numbers() -> None:
    def body() -> tuple[list[float], list[float]]:
        inherited = torch.rand(2).tolist()
        torch.manual_seed(7)
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand(1).item())
            dist.barrier()  # the others draw in between
        return inherited, drawn

    torch.manual_seed(123)
    alone = torch.rand(2).tolist()
    torch.manual_seed(7)
    want = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(123)
    assert Cluster(3, seed=1).run(body) == [(alone, want)] * 3


def test_deadlock_names_every_wait() -> None:
    def body() -> None:
        rank = dist.get_rank()
        pair = dist.new_group([1, 2], group_desc="the_pair")
        if rank == 0:
            dist.recv(torch.zeros(2, 3), src=1, tag=5)
        elif rank == 1:
            dist.all_reduce(torch.zeros(4), group=pair)
            dist.all_reduce(torch.zeros(4), group=pair)
        elif rank == 2:
            dist.all_reduce(torch.zeros(4), group=pair)
            dist.barrier()

    with pytest.raises(DeadlockError) as caught:
        Cluster(4).run(body)
    lines = str(caught.value).splitlines()
    assert lines[0] == "deadlock: every rank waits"
    assert "rank 0: recv of (2, 3) float32 from rank 1 in group '0' (default_pg)" in lines[1]
    assert "tag 5, sequence 0" in lines[1]
    assert "rank 1: all_reduce (sum) of (4,) float32 in group '1' (the_pair) of ranks [1, 2]" in lines[2]
    assert "sequence 1: ranks [2] have not arrived" in lines[2]
    assert "rank 2: barrier in group '0' (default_pg) of ranks [0, 1, 2, 3], sequence 0" in lines[3]
    assert "ranks [0, 1, 3] have not arrived" in lines[3]
    assert lines[4].strip() == "rank 3: finished"
    assert all(f"{__file__}:" in line and "in body" in line for line in lines[1:4])


def test_deadlock_of_a_rank_that_polls() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            work = dist.irecv(torch.zeros(1), 1)
            while not work.is_completed():
                pass
        else:
            dist.barrier()

    with pytest.raises(DeadlockError, match=r"rank 0: polling is_completed\(\)"):
        Cluster(2).run(body)


def test_first_failure_comes_first_and_stops_the_others() -> None:
    unwound: list[int] = []

    def broken_part(rank: int) -> None:
        raise KeyError(f"boom on {rank}")

    def body() -> None:
        rank = dist.get_rank()
        try:
            dist.barrier()
            if rank == 2:
                broken_part(rank)
            dist.all_reduce(torch.ones(1))
        finally:
            unwound.append(rank)

    with pytest.raises(RankFailed) as caught:
        Cluster(4).run(body)
    message = str(caught.value)
    assert message.startswith("rank 2 failed\nTraceback (most recent call last):\n")
    assert message.splitlines()[2].endswith("in body")
    assert "in broken_part" in message
    assert message.index("boom on 2") < message.index("the other ranks were stopped:")
    assert "rank 3: all_reduce (sum) of (1,) float32" in message
    assert caught.value.rank == 2
    assert isinstance(caught.value.__cause__, KeyError)
    assert sorted(unwound) == [0, 1, 2, 3]


def test_stopped_ranks_cannot_go_on_communicating() -> None:
    def body() -> None:
        if dist.get_rank() == 1:
            raise ValueError("first")
        try:
            dist.barrier()
        finally:
            dist.barrier()
            raise ValueError("second")

    with pytest.raises(RankFailed, match="rank 1 failed") as caught:
        Cluster(2).run(body)
    assert "second" not in str(caught.value)


@pytest.mark.parametrize("outcome", ["success", "failure", "deadlock"])
def test_nothing_is_left_behind(outcome: str) -> None:
    def body() -> None:
        torch.rand(3), random.random(), np.random.rand()
        if outcome == "failure":
            raise ValueError("failed on purpose")
        if outcome == "deadlock":
            dist.recv(torch.zeros(1), 0)

    world, backends, hook = c10d._world, list(dist.Backend.backend_list), sys.excepthook
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    threads = threading.active_count()
    cluster = Cluster(3)
    for _ in range(2):
        try:
            cluster.run(body)
        except (RankFailed, DeadlockError):
            assert outcome != "success"
    assert threading.active_count() == threads
    assert c10d._world is world
    assert not dist.is_initialized()
    assert dist.Backend.backend_list == backends
    assert "SIM" not in dist.Backend._plugins
    assert not hasattr(dist.Backend, "SIM")
    assert sys.excepthook is hook
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_real_process_group_of_the_caller_survives() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        Cluster(2).run(busy_program)
        assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 1)
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [1.0, 1.0]
    finally:
        dist.destroy_process_group()


def test_interrupt_stops_the_ranks() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            signal.raise_signal(signal.SIGINT)
        for _ in range(100_000):
            dist.barrier()

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        Cluster(3, trace=False).run(body)
    assert threading.active_count() == threads
    assert Cluster(2).run(dist.get_rank) == [0, 1]


def test_cluster_inside_a_rank_is_refused() -> None:
    with pytest.raises(RankFailed, match="a rank can't host another cluster"):
        Cluster(2).run(lambda: Cluster(2).run(busy_program))


@pytest.mark.filterwarnings("ignore:Device capability of sim unknown")
def test_backend_outside_a_cluster_is_unknown() -> None:
    with pytest.raises(AssertionError, match="sim"):
        dist.init_process_group("sim", store=dist.HashStore(), rank=0, world_size=1)


def test_empty_world_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size is 0, must be positive; the nearest is 1"):
        Cluster(0)


def test_store_blocks_the_rank_and_not_the_process() -> None:
    def body() -> tuple[bytes, int, bool]:
        store = c10d._get_default_store()
        rank = dist.get_rank()
        if rank == 1:
            store.set("answer", "42")
        value = store.get("answer")
        dist.barrier()
        total = store.add("count", rank + 1)
        store.wait(["answer"])
        dist.barrier()
        return value, total, store.check(["nowhere"])

    assert [(value, missing) for value, _, missing in Cluster(3).run(body)] == [(b"42", False)] * 3


def test_key_that_nobody_sets_is_a_deadlock() -> None:
    with pytest.raises(DeadlockError, match="waiting for the store's keys"):
        Cluster(2).run(lambda: c10d._get_default_store().get("never"))
