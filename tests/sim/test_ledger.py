"""Bytes against the formulas in ``longctx.sim.ledger``."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from longctx.sim import Cluster

F32 = 4


def ring(world: int, nbytes: int) -> dict[tuple[int, int], int]:
    return {(rank, (rank + 1) % world): nbytes for rank in range(world)} if world > 1 and nbytes else {}


def chain(order: list[int], nbytes: int) -> dict[tuple[int, int], int]:
    return dict.fromkeys(pairwise(order), nbytes)


def star(world: int, root: int, nbytes: int, *, inward: bool) -> dict[tuple[int, int], int]:
    others = [rank for rank in range(world) if rank != root]
    return {(rank, root) if inward else (root, rank): nbytes for rank in others}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_collective_counts_by_its_formula(world: int) -> None:
    n = 24 * world  # elements, divisible by the world
    last = world - 1
    cases: dict[str, tuple[Callable[[], object], dict[tuple[int, int], int]]] = {
        "all_gather": (
            lambda: dist.all_gather_single(torch.zeros(world * n), torch.zeros(n)),
            ring(world, (world - 1) * n * F32),
        ),
        "reduce_scatter": (
            lambda: dist.reduce_scatter_single(torch.zeros(n // world), torch.zeros(n)),
            ring(world, (world - 1) * n // world * F32),
        ),
        "all_reduce": (lambda: dist.all_reduce(torch.zeros(n)), ring(world, 2 * (world - 1) * n // world * F32)),
        "broadcast": (
            lambda: dist.broadcast(torch.zeros(n), src=last),
            chain([last, *range(last)], n * F32),
        ),
        "reduce": (lambda: dist.reduce(torch.zeros(n), dst=0), chain([*range(1, world), 0], n * F32)),
        "gather": (
            lambda: dist.gather(
                torch.zeros(n), [torch.zeros(n) for _ in range(world)] if dist.get_rank() == last else None, dst=last
            ),
            star(world, last, n * F32, inward=True),
        ),
        "scatter": (
            lambda: dist.scatter(
                torch.zeros(n), [torch.zeros(n) for _ in range(world)] if dist.get_rank() == 0 else None, src=0
            ),
            star(world, 0, n * F32, inward=False),
        ),
        "all_to_all": (
            lambda: dist.all_to_all_single(torch.zeros(n), torch.zeros(n)),
            {(s, d): n // world * F32 for s in range(world) for d in range(world) if s != d},
        ),
        "barrier": (lambda: dist.barrier(), {}),
    }
    cluster = Cluster(world)
    for name, (call, edges) in cases.items():
        cluster.run(call)
        assert cluster.ledger.by_edge() == edges, name
        assert cluster.ledger.by_operation() == ({name: sum(edges.values())} if edges else {}), name
        assert cluster.ledger.total() == sum(edges.values())
        for rank in range(world):
            assert cluster.ledger.sent(rank) == sum(count for (s, _), count in edges.items() if s == rank)


def test_sends_count_per_edge_and_not_to_oneself() -> None:
    def body() -> None:
        rank = dist.get_rank()
        work = dist.irecv(torch.zeros(8, dtype=torch.bfloat16), rank)
        dist.isend(torch.zeros(8, dtype=torch.bfloat16), rank).wait()
        work.wait()
        if rank == 0:
            dist.send(torch.zeros(8, dtype=torch.bfloat16), 2)
        if rank == 2:
            dist.recv(torch.zeros(8, dtype=torch.bfloat16), 0)

    cluster = Cluster(3)
    cluster.run(body)
    assert cluster.ledger.by_edge() == {(0, 2): 16}
    assert cluster.ledger.by_edge("send") == {(0, 2): 16}
    assert cluster.ledger.by_edge("all_reduce") == {}


def test_uneven_blocks_count_exactly() -> None:
    sizes = [1, 5, 2]

    def body() -> None:
        rank = dist.get_rank()
        dist.all_gather([torch.zeros(size) for size in sizes], torch.zeros(sizes[rank]))
        dist.reduce_scatter(torch.zeros(sizes[rank]), [torch.zeros(size) for size in sizes])
        rows = [rank + destination for destination in range(3)]
        dist.all_to_all_single(torch.zeros(sum(rows), 2), torch.zeros(sum(rows), 2), rows, rows)

    cluster = Cluster(3)
    cluster.run(body)
    assert cluster.ledger.by_edge("all_gather") == {(0, 1): 3 * F32, (1, 2): 6 * F32, (2, 0): 7 * F32}
    assert cluster.ledger.by_edge("reduce_scatter") == {(0, 1): 7 * F32, (1, 2): 3 * F32, (2, 0): 6 * F32}
    assert cluster.ledger.by_edge("all_to_all") == {
        (s, d): (s + d) * 2 * F32 for s in range(3) for d in range(3) if s != d
    }


def test_edges_of_a_subgroup_are_global_ranks() -> None:
    def body() -> None:
        group = dist.new_group([1, 3])
        if dist.get_rank() in (1, 3):
            dist.all_reduce(torch.zeros(10), group=group)

    cluster = Cluster(4)
    cluster.run(body)
    assert cluster.ledger.by_edge() == {(1, 3): 40, (3, 1): 40}


def test_creating_groups_costs_no_bytes() -> None:
    cluster = Cluster(4)
    cluster.run(lambda: torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2)))
    assert cluster.ledger.total() == 0


def test_reset_from_rank_code_and_fresh_count_per_run() -> None:
    cluster = Cluster(2)

    def body() -> None:
        dist.all_reduce(torch.zeros(100))
        dist.barrier()
        if dist.get_rank() == 0:
            cluster.ledger.reset()
        dist.barrier()
        dist.broadcast(torch.zeros(4), 0)

    for _ in range(2):
        cluster.run(body)
        assert cluster.ledger.by_operation() == {"broadcast": 16}
        assert cluster.ledger.by_operation(rank=1) == {}
