"""Single and double rings of blocks, against sets of rows counted from who reads what."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.sequence import Contiguous, Documents, Mask, Rows, SequencePlan, Striped, Zigzag, key_ring, query_ring
from tests.sequence.brute_force import examples
from tests.volume.ring_count import visible


def members(rows: Rows) -> set[int]:
    return {row for start, stop in rows.intervals for row in range(start, stop)}


def readings(plan: SequencePlan, queries: bool):
    """(reader, owner) -> the owner's rows that the reader needs, of keys or of queries, from the mask alone."""
    seen = [visible(tuple(docs.lengths.tolist()), plan.mask, plan.length) for docs in plan.documents]
    held = [plan.positions(rank) for rank in range(plan.world)]
    together = sum(seen[1:], seen[0])

    def reads(reader: int, owner: int) -> set[int]:
        q, k = (owner, reader) if queries else (reader, owner)
        cells = together[held[q]][:, held[k]]
        return set(cells.any(axis=1 if queries else 0).nonzero()[0].tolist())

    return reads


@settings(max_examples=150)
@given(examples(longest=60, rows=2), st.booleans(), st.data())
def test_a_block_meets_every_rank_once_with_all_that_it_reads(example, queries, data):
    plan, world = example.plan(), example.world
    lap = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    schedule = query_ring(plan, lap) if queries else key_ring(plan, lap)
    reads = readings(plan, queries)
    for owner in range(world):
        assert sorted(schedule.holder(owner, hop) for hop in range(world)) == list(range(world))
        for hop in range(world):
            holder, stop = schedule.holder(owner, hop), schedule.at(owner, hop)
            assert schedule.owner(holder, hop) == owner
            assert reads(holder, owner) <= members(stop.read) <= members(stop.summed) <= members(stop.carried)
            source = hop - lap if hop % lap == 0 else hop - 1
            if hop:
                assert members(stop.carried) <= members(schedule.carried(owner, source)), "it holds what it passes on"
                before, after = divmod(schedule.holder(owner, source), lap), divmod(holder, lap)
                assert (before[1] == after[1]) if hop % lap == 0 else (before[0] == after[0])
        for start in range(0, world, lap):
            homes = [members(schedule.completed(owner, hop)) for hop in range(start, start + lap)]
            assert sum(map(len, homes)) == len(set().union(*homes)) == len(schedule.at(owner, start).summed)


@settings(max_examples=100)
@given(examples(longest=200, rows=2), st.data())
def test_what_nobody_reads_later_is_left_behind_but_for_a_trifle(example, data):
    plan, world = example.plan(), example.world
    lap = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    schedule, reads = key_ring(plan, lap), readings(plan, False)
    for owner in range(world):
        for hop in range(1, world):
            end = world if hop % lap == 0 else hop - hop % lap + lap
            needed = set().union(*(reads(schedule.holder(owner, later), owner) for later in range(hop, end)))
            carried = schedule.carried(owner, hop)
            source = schedule.carried(owner, hop - lap if hop % lap == 0 else hop - 1)
            if hop % lap == 1 and hop > lap:
                source = schedule.at(owner, hop - 1).summed
            trifle = len(source) - len(needed) <= max(1, len(source) // 32) and needed
            assert members(carried) == (members(source) if trifle else needed)


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped()])
@pytest.mark.parametrize("mask", [Mask(), Mask(False), Mask(window=20)])
def test_one_row_and_rows_of_one_are_the_same_plain_ring(layout, mask):
    plan = SequencePlan([Documents.from_lengths((50, 40))], mask, layout, 96, 4)
    row, column = key_ring(plan, 4), key_ring(plan, 1)
    assert row is key_ring(plan) and (row.cost[0], column.cost[1]) == (0, 0)
    assert row.direction == column.direction
    for owner in range(4):
        assert [row.holder(owner, hop) for hop in range(4)] == [column.holder(owner, hop) for hop in range(4)]
        assert [row.carried(owner, hop) for hop in range(4)] == [column.carried(owner, hop) for hop in range(4)]


def test_crossings_are_what_is_saved_first():
    """Contiguous and causal: a block never crosses to rows before its own, and never twice."""
    plan = SequencePlan([Documents.single(96)], Mask(), Contiguous(), 96, 8)
    assert key_ring(plan, 4).cost[0] == 4 * 12
    assert key_ring(plan, 2).cost[0] == 2 * 12 * (3 + 2 + 1)
