"""Fault plans: each kind strikes where it is told to, once, and its consequence is what a cluster would see."""

import pytest
import torch
import torch.distributed as dist

from longctx.sim import Cluster, DeadlockError, Fault, FaultPlan, RankFailed, RankKilled, mark_step


def training(steps: int = 3) -> list[float]:
    """A step sends one message around the ring and sums twice."""
    rank, world = dist.get_rank(), dist.get_world_size()
    totals = []
    for step in range(steps):
        mark_step(step)
        buffer = torch.zeros(3)
        work = dist.irecv(buffer, (rank - 1) % world)
        dist.send(torch.full((3,), float(rank + 1)), (rank + 1) % world)
        work.wait()
        dist.all_reduce(buffer)
        dist.all_reduce(buffer)
        totals.append(buffer.sum().item())
    return totals


def test_kill_names_rank_step_and_operation() -> None:
    plan = FaultPlan([Fault("kill", rank=1, operation="all_reduce", step=2, occurrence=1)])
    cluster = Cluster(3, faults=plan)
    with pytest.raises(RankFailed, match="rank 1 failed") as caught:
        cluster.run(training)
    assert isinstance(caught.value.__cause__, RankKilled)
    assert str(caught.value.__cause__) == "rank 1 killed by the fault plan in all_reduce of step 2"
    posted = [event for event in cluster.trace[1] if event.phase == "post" and event.operation == "all_reduce"]
    assert len(posted) == 5  # two in each of steps 0 and 1, the first of step 2
    assert cluster.fired == list(plan.faults)


def test_except_exception_does_not_survive_a_kill() -> None:
    def body() -> str:
        try:
            dist.barrier()
        except Exception:
            return "survived"
        return "unharmed"

    with pytest.raises(RankFailed):
        Cluster(2, faults=[Fault("kill", 0, "barrier")]).run(body)


def test_hang_deadlocks_the_others_and_is_named() -> None:
    with pytest.raises(DeadlockError, match="rank 2: hung by the fault plan in send") as caught:
        Cluster(3, faults=[Fault("hang", rank=2, operation="send", step=1)]).run(training)
    assert "rank 0: recv of (3,) float32 from rank 2" in str(caught.value)


def test_dropped_message_leaves_its_receiver_waiting() -> None:
    with pytest.raises(DeadlockError) as caught:
        Cluster(3, faults=[Fault("drop", rank=0, operation="send", step=1)]).run(training)
    assert "rank 1: recv of (3,) float32 from rank 0" in str(caught.value)
    assert "rank 2: all_reduce" in str(caught.value)


def test_dropped_share_of_a_collective_leaves_everyone_waiting() -> None:
    with pytest.raises(DeadlockError) as caught:
        Cluster(3, faults=[Fault("drop", rank=0, operation="all_reduce")]).run(training)
    assert str(caught.value).count("ranks [0] have not arrived") == 3


@pytest.mark.parametrize("operation", ["send", "recv", "all_reduce", "*"])
@pytest.mark.parametrize("turns", [0, 1, 7, 10_000])
def test_delay_changes_no_result(operation: str, turns: int) -> None:
    cluster = Cluster(3, faults=[Fault("delay", rank=1, operation=operation, step=1, turns=turns)])
    assert cluster.run(training) == Cluster(3).run(training)
    assert len(cluster.fired) == 1


def test_delayed_message_arrives_later_than_others() -> None:
    def body() -> list[bool]:
        if dist.get_rank() == 1:
            dist.send(torch.ones(1), 0, tag=1)
            dist.send(torch.ones(1), 0, tag=2)
            return []
        works = [dist.irecv(torch.zeros(1), 1, tag=tag) for tag in (1, 2)]
        while not any(arrived := [work.is_completed() for work in works]):
            pass
        for work in works:
            work.wait()
        return arrived

    assert Cluster(2, faults=[Fault("delay", 1, "send", turns=50)]).run(body)[0] == [False, True]


def test_corrupt_message_flips_one_bit_of_the_copy() -> None:
    def body() -> list[float]:
        mine, buffer = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
        if dist.get_rank() == 0:
            dist.send(mine, 1)
            return mine.tolist()
        dist.recv(buffer, 0)
        return buffer.tolist()

    sign_of_second = Fault("corrupt", 0, "send", element=1, bit=-1)
    assert Cluster(2, faults=[sign_of_second]).run(body) == [[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]]
    highest_exponent_bit = Fault("corrupt", 0, "send")
    assert Cluster(2, faults=[highest_exponent_bit]).run(body)[1] == [float("inf"), 2.0, 3.0]
    lowest_mantissa_bit = Fault("corrupt", 0, "send", element=2, bit=0)
    assert Cluster(2, faults=[lowest_mantissa_bit]).run(body)[1] == [1.0, 2.0, 3.0 + 2**-22]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_corrupt_share_of_a_collective_reaches_everyone(dtype: torch.dtype) -> None:
    def body() -> list[float]:
        tensor = torch.ones(2, dtype=dtype)
        dist.all_reduce(tensor)
        return tensor.tolist()

    sign = Fault("corrupt", rank=1, operation="all_reduce", bit=-1)
    broken = [1 - 2**63 + 1 if dtype == torch.int64 else 0, 2]
    assert Cluster(2, faults=[sign]).run(body) == [broken, broken]


def test_same_fault_twice_strikes_two_occurrences() -> None:
    faults = [Fault("delay", 0, "all_reduce", occurrence=i) for i in range(2)]
    cluster = Cluster(2, faults=faults)
    cluster.run(training, 1)
    assert cluster.fired == faults


def test_fault_that_never_matches_does_not_fire() -> None:
    cluster = Cluster(2, faults=[Fault("kill", 0, "broadcast"), Fault("kill", 1, "send", step=99)])
    cluster.run(training)
    assert cluster.fired == []


def test_mark_step_outside_a_cluster_does_nothing() -> None:
    mark_step(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kil", "rank": 0}, "fault kind 'kil' must be one of .*; the nearest is 'kill'"),
        ({"kind": "kill", "rank": 0, "operation": "allreduce"}, "the nearest is 'all_reduce'"),
        ({"kind": "drop", "rank": 0, "operation": "recv"}, "name the sender's operation"),
        ({"kind": "corrupt", "rank": 0, "operation": "barrier"}, "that operation sends no data"),
        ({"kind": "kill", "rank": -1}, "rank of a fault is -1, must not be negative"),
    ],
)
def test_impossible_faults_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fault(**arguments)  # type: ignore[arg-type]


def test_fault_at_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="fault at rank 4: the cluster has ranks 0 to 3; the nearest is 3"):
        Cluster(4, faults=[Fault("kill", 4)])
