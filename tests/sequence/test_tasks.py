"""What servers ask of homes, worked out by runs, against its definition token by token."""

import gc
import random
import weakref
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.disaggregated import dispatches
from longctx.planner import Widths
from longctx.sequence import Contiguous, Documents, Homes, Mask, SequencePlan, Striped, Zigzag
from longctx.sequence.tasks import Dispatch, Task

LAYOUTS = [Contiguous(), Zigzag(), Striped(1), Striped(3)]
MASKS = [Mask(), Mask(window=4), Mask(causal=False), Mask(causal=False, window=3)]


def random_cuts(row, documents, world, seed, finest=2):
    """Every document's square, or what is left of it after further cuts, on random servers."""
    chance = random.Random(seed)

    def cut(q, k):
        sides = [side for side in (q, k) if side[1] - side[0] > finest]
        if not sides or chance.random() < 0.3:
            return [Task(row, *q, *k, chance.randrange(world))]
        side = chance.choice(sides)
        at = chance.randint(side[0] + 1, side[1] - 1)
        parts = [(side[0], at), (at, side[1])]
        return [task for part in parts for task in cut(*((part, k) if side is q else (q, part)))]

    found = [
        task for start, stop in pairwise(documents.cu_seqlens.tolist()) for task in cut((start, stop), (start, stop))
    ]
    chance.shuffle(found)
    return found


def by_definition(homes, tasks, server):
    """Cells served at home, queries and keys of the rest, as sets of token numbers."""
    own = set(homes.numbers[server].tolist())
    here, rest, queries, keys = 0, 0, set(), set()
    for task in (task for task in tasks if task.server == server):
        starts, stops = homes.mask.key_range(np.arange(task.q_start, task.q_stop), homes.documents[task.row])
        for query, start, stop in zip(range(task.q_start, task.q_stop), starts.tolist(), stops.tolist(), strict=True):
            shift = task.row * homes.length
            seen = {shift + key for key in range(max(start, task.k_start), min(stop, task.k_stop))}
            if seen and {shift + query} | seen <= own:
                here += len(seen)
            elif seen:
                rest += len(seen)
                queries.add(shift + query)
                keys |= seen
    return here, rest, queries, keys


def compare(homes, dispatch, tasks):
    for server in range(homes.world):
        served = dispatch.served(server)
        here, rest, queries, keys = by_definition(homes, tasks, server)
        assert sum(tiles.cells for tiles in served.here) == here
        assert sum(tiles.cells for tiles in served.rest) == rest
        for wanted, rows, places in (
            (queries, served.queries, served.query_places),
            (keys, served.keys, served.key_places),
        ):
            assert places.positions.tolist() == sorted(wanted)
            for home, (numbers, line) in enumerate(zip(homes.numbers, homes.lines, strict=True)):
                lie = [at for number, at in zip(numbers.tolist(), line.tolist(), strict=True) if number in wanted]
                assert [at for start, stop in rows[home].intervals for at in range(start, stop)] == lie
                assert all(one[1] < other[0] for one, other in pairwise(rows[home].intervals)), (
                    "joined where they touch"
                )
                assert places.counts[home] == len(lie)


@given(
    st.lists(st.lists(st.integers(1, 19), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(1, 5),
    st.sampled_from(LAYOUTS),
    st.sampled_from(MASKS),
    st.integers(0, 2**16),
)
def test_servers_ask_for_what_their_tasks_need(rows, world, layout, mask, seed):
    documents = tuple(Documents.from_lengths(lengths) for lengths in rows)
    length = max(row.length for row in documents) + seed % 3
    plan = SequencePlan(documents, mask, layout, length, world, multiple=2)
    homes = Homes.of(plan)
    tasks = [task for number, row in enumerate(documents) for task in random_cuts(number, row, world, seed + number)]
    compare(homes, Dispatch(homes, tuple(tasks)), tasks)


def test_tasks_over_several_documents_and_padding_are_those_of_each():
    """A run of queries may cross documents' edges; each still sees its own document's keys alone."""
    documents = (Documents.from_lengths([5, 1, 9]),)
    homes = Homes.of(SequencePlan(documents, Mask(), Contiguous(), 18, 3))
    tasks = [Task(0, 0, 11, 0, 18, 1), Task(0, 11, 18, 0, 18, 2)]
    compare(homes, Dispatch(homes, tuple(tasks)), tasks)


def test_without_tasks_nobody_asks():
    homes = Homes.of(SequencePlan((Documents.single(6),), Mask(), Zigzag(), 6, 2))
    served = Dispatch(homes, ()).served(1)
    assert served.here == served.rest == () and served.cells == 0
    assert [len(served.queries[home]) for home in range(2)] == [len(served.keys[home]) for home in range(2)] == [0, 0]


@pytest.mark.parametrize("world", [8, 64])
def test_what_is_worked_out_goes_with_cuts_and_not_with_tokens(world):
    """32,768 tokens a rank; a token of each would be 32,768 pieces a rank, in as many passes as there are ranks."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(100, 9000, size=world * 32768)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), world * 32768))]
    documents = (Documents.from_lengths([*lengths.tolist(), world * 32768 - int(lengths.sum())]),)
    plan = SequencePlan(documents, Mask(), Zigzag(), world * 32768, world)
    there, _ = dispatches(plan, "cad", Widths())
    runs, cuts = len(Homes.of(plan).runs.start), len(documents[0]) + 2 * world
    assert runs <= 2 * world
    assert len(there.pieces.first) <= 4 * cuts


def test_a_plan_that_was_dispatched_does_not_outlive_its_batch():
    plan = SequencePlan((Documents.from_lengths([90, 7, 31]),), Mask(), Contiguous(), 128, 4)
    there, _ = dispatches(plan, "cad", Widths())
    there.ready(2)
    kept = weakref.ref(plan)
    del plan, there
    gc.collect()
    assert kept() is None
