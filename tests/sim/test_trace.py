"""What the trace says about each rank's program."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

from longctx.sim import Cluster, Event, mark_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_post_and_wait_share_an_id_and_keep_program_order() -> None:
    def body() -> None:
        rank = dist.get_rank()
        mark_step(4)
        buffer = torch.zeros(2, 3)
        receive = dist.irecv(buffer, 1 - rank, tag=6)
        total = dist.all_reduce(torch.zeros(5, dtype=torch.float64), async_op=True)
        dist.send(torch.zeros(2, 3), 1 - rank, tag=6)
        total.wait()
        receive.wait()

    cluster = Cluster(2)
    cluster.run(body)
    for rank, events in enumerate(cluster.trace):
        assert [(event.phase, event.operation) for event in events] == [
            ("step", "step"),
            ("post", "recv"),
            ("post", "all_reduce"),
            ("post", "send"),
            ("wait", "send"),
            ("wait", "all_reduce"),
            ("wait", "recv"),
        ]
        assert {event.step for event in events} == {4}
        receive, total, send = events[1:4]
        assert (events[4].id, events[5].id, events[6].id) == (send.id, total.id, receive.id)
        other = 1 - rank
        assert receive[4:] == (0, "0", (0, 1), (other,), ((2, 3),), "float32", 6, 0, 0)
        assert total[4:] == (40, "0", (0, 1), (other,), ((5,),), "float64", 0, 0, 0)
        assert send[4:] == (24, "0", (0, 1), (other,), ((2, 3),), "float32", 6, 0, 0)
    ids = [event.id for events in cluster.trace for event in events if event.phase == "post"]
    assert len(ids) == len(set(ids)) == 6


def test_sequence_numbers_pair_the_ranks() -> None:
    def body() -> None:
        rank = dist.get_rank()
        group = dist.new_group([0, 2])
        for _ in range(3):
            if rank != 1:
                dist.barrier(group)
            dist.all_reduce(torch.zeros(1))
        for tag in (1, 2, 1):
            if rank == 0:
                dist.send(torch.zeros(1), 1, tag=tag)
            if rank == 1:
                dist.recv(torch.zeros(1), 0, tag=tag)

    cluster = Cluster(3)
    cluster.run(body)

    def posts(rank: int, operation: str) -> list[Event]:
        return [event for event in cluster.trace[rank] if (event.phase, event.operation) == ("post", operation)]

    for rank in (0, 2):
        assert [(event.group, event.sequence) for event in posts(rank, "barrier")] == [("1", 0), ("1", 1), ("1", 2)]
    for rank in range(3):
        assert [event.sequence for event in posts(rank, "all_reduce")] == [0, 1, 2]
    assert [(event.tag, event.sequence) for event in posts(0, "send")] == [(1, 0), (2, 0), (1, 1)]
    assert [(event.tag, event.sequence) for event in posts(1, "recv")] == [(1, 0), (2, 0), (1, 1)]


def test_functional_collectives_post_and_await() -> None:
    def body() -> None:
        pending = functional_all_reduce(torch.ones(4), "sum", dist.group.WORLD)
        dist.barrier()
        assert pending.tolist() == [2.0] * 4

    cluster = Cluster(2)
    cluster.run(body)
    assert [(event.phase, event.operation) for event in cluster.trace[0]] == [
        ("post", "all_reduce"),
        ("post", "barrier"),
        ("wait", "barrier"),
        ("wait", "all_reduce"),
    ]


def test_trace_can_be_left_out() -> None:
    cluster = Cluster(2, trace=False)
    cluster.run(lambda: dist.all_reduce(torch.ones(1)))
    assert cluster.trace == [[], []]
    assert cluster.ledger.total() == 8


def test_bytes_of_the_trace_are_the_ledgers() -> None:
    def body() -> None:
        rank = dist.get_rank()
        dist.all_gather_single(torch.zeros(9), torch.zeros(3))
        dist.broadcast(torch.zeros(7), 1)
        dist.all_to_all_single(torch.zeros(6), torch.zeros(6))
        work = dist.irecv(torch.zeros(2), (rank - 1) % 3)
        dist.send(torch.zeros(2), (rank + 1) % 3)
        work.wait()

    cluster = Cluster(3)
    cluster.run(body)
    for rank, events in enumerate(cluster.trace):
        assert sum(event.bytes for event in events if event.phase == "post") == cluster.ledger.sent(rank)


def test_compute_is_recorded_with_flops_between_communication() -> None:
    def body() -> int:
        x = torch.ones(8, 16, requires_grad=True)
        w = torch.ones(16, 4, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y = x @ w
            dist.all_reduce(y.detach())
            y.sum().backward()
        return counter.get_total_flops()

    cluster = Cluster(2, trace_compute=True)
    flops = cluster.run(body)
    for rank, events in enumerate(cluster.trace):
        products = [event for event in events if event.operation == "aten.mm"]
        assert [event.flops for event in products] == [2 * 8 * 16 * 4] * 3
        assert products[0].shapes == ((8, 16), (16, 4))
        assert products[0].bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)
        assert sum(event.flops for event in events) == flops[rank]
        order = [event.operation for event in events]
        assert order.index("aten.mm") < order.index("all_reduce") < order.index("aten.sum")
        # What the cluster itself does to move data is nobody's compute.
        assert not {"aten.clone", "aten.copy_", "aten.add_"} & set(order)


def test_attention_on_the_cpu_counts_its_flops() -> None:
    def body() -> None:
        q = torch.ones(1, 2, 8, 4, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    cluster = Cluster(1, trace_compute=True)
    cluster.run(body)
    flops = {event.operation: event.flops for event in cluster.trace[0] if "flash" in event.operation}
    full = 2 * 1 * 2 * 8 * 8 * 4  # one product of [1, 2, 8, 4] with [1, 2, 4, 8]
    assert flops == {
        "aten._scaled_dot_product_flash_attention_for_cpu": 2 * full,
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": 5 * full,
    }


@torch.library.custom_op("sim_test::product_then_sum", mutates_args=())
def product_then_sum(a: torch.Tensor) -> torch.Tensor:
    product = a @ a
    dist.all_reduce(product)
    return product + 1


@product_then_sum.register_fake
def _(a: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(a)


@pytest.mark.parametrize("fake", [False, True])
def test_custom_operator_is_opened_up_unless_it_has_a_formula(fake: bool) -> None:
    cluster = Cluster(2, trace_compute=True, fake=fake)
    shapes = cluster.run(lambda: tuple(product_then_sum(torch.ones(2, 2)).shape))
    assert shapes == [(2, 2), (2, 2)]
    order = [event.operation for event in cluster.trace[0]]
    inner = order[order.index("aten.mm") : order.index("aten.add") + 1]
    assert inner == ["aten.mm", "all_reduce", "all_reduce", "aten.add"]
    assert "sim_test.product_then_sum" not in order


def test_compute_of_fake_tensors_is_recorded() -> None:
    def body() -> None:
        x = torch.empty(1 << 20, 1 << 20)
        for _ in range(2):  # the second time from FakeTensorMode's cache
            y = x @ x
        dist.all_reduce(y)

    cluster = Cluster(2, fake=True, trace_compute=True)
    cluster.run(body)
    assert [event.flops for event in cluster.trace[1] if event.operation == "aten.mm"] == [2 << 60] * 2


@pytest.mark.parametrize("fake", [False, True])
def test_sharded_training_step_counts_local_flops(fake: bool) -> None:
    width, inner, tokens = (4096, 16384, 1024) if fake else (16, 64, 8)

    def body() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = nn.Sequential(nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            model(torch.randn(tokens, width)).sum().backward()
            optimizer.step()

    cluster = Cluster(4, fake=fake, trace_compute=True)
    cluster.run(body)
    product = 2 * tokens * width * inner // 2  # half of it, by tensor parallelism
    for events in cluster.trace:
        # Forward two, backward three: the first layer's input needs no gradient.
        assert [event.flops for event in events if event.operation == "aten.mm"] == [product] * 10


def test_integers_stay_real_among_fake_tensors() -> None:
    def body() -> tuple[list[int], bool, tuple[int, ...]]:
        positions = torch.arange(4)
        dist.all_reduce(positions)
        table = torch.randn(10, 1 << 30)
        rows = table[torch.randint(10, (3,))]
        return positions.tolist(), isinstance(rows, torch._subclasses.FakeTensor), tuple(rows.shape)

    assert Cluster(2, fake=True).run(body) == [([0, 2, 4, 6], True, (3, 1 << 30))] * 2
