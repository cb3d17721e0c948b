"""Sends and receives: matching by source, tag and order."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from longctx.sim import Cluster, MismatchError, RankFailed


@pytest.mark.parametrize("world", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float64])
def test_ring_with_batched_messages(world: int, dtype: torch.dtype) -> None:
    def body() -> list[float]:
        rank = dist.get_rank()
        seen, current = [], torch.full((2, 2), float(rank)).to(dtype)
        for _ in range(world):
            seen.append(current.sum().item() / 4)
            following = torch.empty_like(current)
            ops = [
                dist.P2POp(dist.irecv, following, (rank - 1) % world),
                dist.P2POp(dist.isend, current, (rank + 1) % world),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            current = following
        return seen

    for rank, seen in enumerate(Cluster(world).run(body)):
        assert seen == [(rank - step) % world for step in range(world)]


def test_tags_match_out_of_order() -> None:
    def body() -> list[float]:
        if dist.get_rank() == 0:
            for tag in (3, 1, 2):
                dist.send(torch.tensor([float(tag)]), 1, tag=tag)
            return []
        got = []
        for tag in (1, 2, 3):
            buffer = torch.zeros(1)
            dist.recv(buffer, 0, tag=tag)
            got.append(buffer.item())
        return got

    assert Cluster(2).run(body)[1] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("receiver_first", [True, False])
def test_same_tag_matches_in_posting_order_however_handles_are_awaited(receiver_first: bool) -> None:
    def body() -> list[float]:
        if dist.get_rank() == 0:
            if receiver_first:
                dist.barrier()
            for value in (1.0, 2.0, 3.0):
                dist.send(torch.tensor([value]), 1)
            if not receiver_first:
                dist.barrier()
            return []
        if not receiver_first:
            dist.barrier()
        buffers = [torch.zeros(1) for _ in range(3)]
        works = [dist.irecv(buffer, 0) for buffer in buffers]
        if receiver_first:
            dist.barrier()
        for work in reversed(works):
            work.wait()
        return [buffer.item() for buffer in buffers]

    assert Cluster(2).run(body)[1] == [1.0, 2.0, 3.0]


def test_receive_from_any_source_reports_the_sender() -> None:
    def body() -> list[tuple[int, float]]:
        rank = dist.get_rank()
        if rank:
            dist.send(torch.tensor([float(rank)]), 0)
            return []
        got = []
        for _ in range(3):
            buffer = torch.zeros(1)
            got.append((dist.recv(buffer), buffer.item()))
        return got

    cluster = Cluster(4)
    got = cluster.run(body)[0]
    assert sorted(got) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    waits = [event for event in cluster.trace[0] if event.phase == "wait"]
    assert [event.peers for event in waits] == [(source,) for source, _ in got]


def test_receive_from_any_source_in_a_subgroup_reports_the_global_rank() -> None:
    def body() -> int | None:
        group = dist.new_group([1, 3])
        if dist.get_rank() == 3:
            dist.send(torch.ones(1), 1, group=group)
        if dist.get_rank() == 1:
            return dist.recv(torch.zeros(1), group=group)
        return None

    assert Cluster(4).run(body) == [None, 3, None, None]


def test_message_is_a_copy_of_what_was_sent() -> None:
    def body() -> float:
        buffer = torch.ones(1)
        if dist.get_rank() == 0:
            work = dist.isend(buffer, 1)
            buffer.fill_(7.0)
            work.wait()
        else:
            dist.recv(buffer, 0)
        return buffer.item()

    assert Cluster(2).run(body) == [7.0, 1.0]


def test_is_completed_is_false_before_arrival_and_polling_ends() -> None:
    def body() -> tuple[bool, float]:
        buffer = torch.zeros(1)
        if dist.get_rank() == 1:
            dist.barrier()
            dist.send(torch.tensor([5.0]), 0)
            return True, 5.0
        work = dist.irecv(buffer, 1)
        early = work.is_completed()
        dist.barrier()
        while not work.is_completed():
            pass
        work.wait()
        return early, buffer.item()

    assert Cluster(2).run(body) == [(False, 5.0), (True, 5.0)]


def test_send_to_oneself_and_objects() -> None:
    def body() -> tuple[float, list[object]]:
        rank = dist.get_rank()
        buffer = torch.zeros(1)
        work = dist.irecv(buffer, rank)
        dist.isend(torch.tensor([rank + 0.5]), rank).wait()
        work.wait()
        objects: list[object] = ["ping", {"from": rank}]
        if rank == 0:
            dist.send_object_list(objects, dst=1)
        else:
            objects = [None, None]
            dist.recv_object_list(objects, src=0)
        return buffer.item(), objects

    assert Cluster(2).run(body) == [(0.5, ["ping", {"from": 0}]), (1.5, ["ping", {"from": 0}])]


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: dist.isend(t, 0),
        lambda t: dist.irecv(t, 0),
        lambda t: dist.all_reduce(t),
        lambda t: dist.broadcast(t, 1),
        lambda t: dist.all_gather_single(torch.zeros(12), t),
        lambda t: dist.all_to_all_single(torch.zeros(2, 3), t),
    ],
)
def test_strided_tensors_are_refused_as_on_real_backends(operation: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(RankFailed, match=r"must be contiguous; call .contiguous\(\) first"):
        Cluster(2).run(lambda: operation(torch.zeros(3, 2).T))


@pytest.mark.parametrize("buffer", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_message_that_does_not_fit_is_refused(buffer: torch.Tensor) -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            dist.send(torch.zeros(2), 1, tag=9)
        else:
            dist.recv(buffer, 0, tag=9)

    with pytest.raises(RankFailed, match="rank 1 failed") as caught:
        Cluster(2).run(body)
    assert isinstance(caught.value.__cause__, MismatchError)
    assert "message 0 with tag 9 from group rank 0 has 2 elements of torch.float32" in str(caught.value)
