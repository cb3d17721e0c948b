"""Exchanges: batched messages, awaited once, counted by what leaves a rank."""

import pytest
import torch
import torch.distributed as dist

from longctx.comm import SUM, Group, all_reduce, broadcast, exchange, grid_of, group_named, group_of, two_way
from longctx.sim import Cluster, DeadlockError


def test_messages_arrive_in_the_order_in_which_both_sides_post_them():
    def body():
        group = group_of(dist.group.WORLD)
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        pending = [
            exchange(
                group,
                [(after, torch.full((3,), 10.0 * group.rank + i)), (before, torch.full((2,), -10.0 * group.rank - i))],
                [(before, torch.empty(3)), (after, torch.empty(2))],
            )
            for i in range(4)
        ]
        return [[int(tensor[0]) for tensor in one.wait()] for one in reversed(pending)]

    for rank, received in enumerate(Cluster(3).run(body)):
        after, before = (rank + 1) % 3, (rank - 1) % 3
        assert received == [[10 * before + i, -10 * after - i] for i in (3, 2, 1, 0)]


def test_receives_are_posted_before_sends(monkeypatch):
    """Gloo tells a sender that its receiver is ready on the connection that carries messages the other way."""
    posted = []
    batch = dist.batch_isend_irecv
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: posted.append([op.op for op in ops]) or batch(ops))

    def body():
        other = 1 - dist.get_rank()
        sends, receives = [(other, torch.ones(2)), (other, torch.ones(3))], [(other, torch.empty(2))]
        exchange(group_of(dist.group.WORLD), sends, [*receives, (other, torch.empty(3))]).wait()

    Cluster(2).run(body)
    assert posted == [[dist.irecv, dist.irecv, dist.isend, dist.isend]] * 2


def test_bytes_are_counted_by_receiver_under_global_ranks():
    def body():
        pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
        mine = group_of(pairs[0] if dist.get_rank() in (0, 3) else pairs[1])
        exchange(mine, [(1 - mine.rank, torch.ones(5))], [(1 - mine.rank, torch.empty(5))]).wait()
        all_reduce(mine, torch.ones(3), SUM)
        broadcast(mine, torch.ones(7), 0)
        return mine.traffic.by_receiver

    cluster = Cluster(4)
    counted = cluster.run(body)
    assert counted == [{3: 20 + 12 + 28}, {2: 60}, {1: 32}, {0: 32}]
    assert {(rank, to): size for rank, by in enumerate(counted) for to, size in by.items()} == cluster.ledger.by_edge()


def test_an_empty_message_is_not_sent_and_costs_nothing():
    def body():
        group = group_of(dist.group.WORLD)
        other = 1 - group.rank
        sends = [(other, torch.empty(0, 7)), (other, torch.ones(2, dtype=torch.float64))]
        pending = exchange(group, sends, [(other, torch.empty(7, 0)), (other, torch.empty(2, dtype=torch.float64))])
        empty, full = pending.wait()
        assert exchange(group, [], []).wait() == []
        return empty.shape, full.tolist(), group.traffic.bytes, group.traffic.messages

    cluster = Cluster(2)
    assert cluster.run(body) == [((7, 0), [1.0, 1.0], 16, 1)] * 2
    assert cluster.ledger.by_operation() == {"send": 32}
    assert cluster.ledger.by_edge() == {(0, 1): 16, (1, 0): 16}


def test_a_pending_exchange_is_awaited_once():
    def body():
        group = group_of(dist.group.WORLD)
        pending = exchange(group, [(1 - group.rank, torch.ones(1))], [(1 - group.rank, torch.empty(1))])
        pending.wait()
        with pytest.raises(AssertionError, match="awaited exactly once"):
            pending.wait()

    Cluster(2).run(body)


def test_ranks_of_a_subgroup_are_numbered_within_it_and_counted_apart():
    def body():
        pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
        mine = group_of(pairs[0] if dist.get_rank() in (0, 3) else pairs[1])
        assert mine.size == 2 and mine.rank == (dist.get_rank() > 1)
        [arrived] = exchange(
            mine, [(1 - mine.rank, torch.tensor([dist.get_rank()]))], [(1 - mine.rank, torch.tensor([-1]))]
        ).wait()
        assert group_of(dist.group.WORLD).traffic.bytes == 0
        return int(arrived), mine.traffic.bytes

    cluster = Cluster(4)
    assert cluster.run(body) == [(3, 8), (2, 8), (1, 8), (0, 8)]
    assert set(cluster.ledger.by_edge()) == {(0, 3), (3, 0), (1, 2), (2, 1)}


def test_a_group_is_found_by_the_name_that_passes_through_operators():
    def body():
        for process_group in (dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0, 1])):
            group = group_of(process_group)
            assert group_named(group.name) == group
            assert group_named(group.name).traffic is group.traffic
        return True

    assert Cluster(2).run(body) == [True, True]


def test_a_grid_and_its_other_channel_are_found_by_name_and_count_together():
    def body():
        for inner in (1, 2, 4):
            grid = two_way(grid_of(dist.group.WORLD, inner))
            assert group_named(grid.name) == grid and grid == two_way(grid_of(dist.group.WORLD, inner))
            assert (grid.inner.size, grid.outer.size, grid.back.size) == (inner, 4 // inner, 4)
            assert grid.rank == grid.back.rank == grid.outer.rank * inner + grid.inner.rank
            assert grid.back.process_group is not grid.process_group
        other = (grid.rank + 1) % 4, (grid.rank - 1) % 4
        before = grid.traffic.messages
        # The same two ranks, in another order on either channel: neither waits for the other.
        first, second = (grid, grid.back) if grid.rank % 2 else (grid.back, grid)
        posted = {one.name: exchange(one, [(other[0], torch.tensor([one is grid]))], []) for one in (first, second)}
        for one in (grid, grid.back):
            [came] = exchange(one, [], [(other[1], torch.tensor([False]))]).wait()
            assert bool(came) is (one is grid)
            posted[one.name].wait()
        return grid.traffic.messages - before

    assert Cluster(4).run(body) == [2] * 4
    alone = two_way(grid_of(None, 1))
    assert group_named(alone.name) == alone and alone.back == Group(None, 0, 1)


def test_a_single_process_needs_no_process_group():
    group = group_of(None)
    assert (group, group.name, group_named("")) == (Group(None, 0, 1), "", group)
    assert vars(group.traffic) == {"bytes": 0, "messages": 0, "by_receiver": {}, "timeline": None}
    assert exchange(group, [(0, torch.empty(0))], [(0, torch.empty(0))]).wait()[0].numel() == 0


def test_traffic_does_not_outlive_its_group():
    def body():
        group = group_of(dist.group.WORLD)
        before = group.traffic.bytes
        exchange(group, [(1 - group.rank, torch.ones(5))], [(1 - group.rank, torch.empty(5))]).wait()
        return before, group.traffic.bytes

    cluster = Cluster(2)
    assert cluster.run(body) == cluster.run(body) == [(0, 20)] * 2


def test_sides_that_disagree_about_an_empty_message_deadlock_with_a_report():
    def body():
        group = group_of(dist.group.WORLD)
        size = group.rank  # rank 0 sends nothing, rank 1 expects one number
        exchange(group, [(1 - group.rank, torch.ones(0))], [(1 - group.rank, torch.empty(size))]).wait()

    with pytest.raises(DeadlockError, match=r"rank 1: recv of \(1,\) float32 from rank 0"):
        Cluster(2).run(body)
