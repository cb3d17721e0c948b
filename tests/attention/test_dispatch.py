"""What a rank sends, receives and computes, worked out by runs, against its definition token by token."""

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.runtime.local_kernel import kernel_for
from longctx.attention.runtime.operator import AttentionContext
from longctx.attention.strategies.disaggregated.assignment import home_of
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.attention.strategies.disaggregated.prepared import dispatches, dispatches_of, prepared
from longctx.comm import group_of
from longctx.options import DEFAULT
from longctx.planner import AttentionShape, legality
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Striped, Zigzag
from tests.attention.cuts import Homes, plan_of, random_pieces

LAYOUTS = [Contiguous(), Zigzag(), Striped(1), Striped(3)]
MASKS = [Mask(), Mask(window=4), Mask(causal=False), Mask(causal=False, window=3)]


def by_definition(homes, pieces, server):
    """Cells served at home, queries and keys of the rest, as sets of token numbers. A piece is at home as far as all
    that its rows see lies side by side on the server."""
    first_number = [
        row * homes.one.length + start
        for row, one in enumerate(homes.documents)
        for start in one.cu_seqlens[:-1].tolist()
    ]
    lengths = [length for one in homes.documents for length in one.lengths.tolist()]
    line = dict(zip(homes.numbers[server].tolist(), homes.local[server].tolist(), strict=True))
    here, rest, queries, keys = 0, 0, set(), set()
    for doc, q0, q1, k0, k1, _ in (piece for piece in pieces if piece[5] == server):
        starts, stops = homes.one.mask.key_range(np.arange(q0, q1), Documents.single(lengths[doc]))
        for query, start, stop in zip(range(q0, q1), starts.tolist(), stops.tolist(), strict=True):
            seen = [first_number[doc] + key for key in range(max(start, k0), min(stop, k1))]
            places = [line.get(key) for key in seen]
            beside = None not in places and places == list(range(places[0], places[0] + len(seen))) if seen else False
            if beside and first_number[doc] + query in line:
                here += len(seen)
            elif seen:
                rest += len(seen)
                queries.add(first_number[doc] + query)
                keys |= set(seen)
    return here, rest, queries, keys


def compare(homes, dispatch, pieces):
    cells = 0
    for server in range(homes.world):
        served = dispatch.served(server)
        here, rest, queries, keys = by_definition(homes, pieces, server)
        assert sum(tiles.cells for tiles in served.local) == here
        assert sum(tiles.cells for tiles in served.remote) == rest
        assert dispatch.cells(server) == here + rest
        cells += here + rest
        for wanted, side, moved in (
            (queries, "queries", dispatch.query_rows),
            (keys, "keys", dispatch.key_rows),
        ):
            places = getattr(served, side).places
            assert len(places.positions) == len(wanted)
            for home, (numbers, line) in enumerate(zip(homes.numbers, homes.local, strict=True)):
                lie = [at for number, at in zip(numbers.tolist(), line.tolist(), strict=True) if number in wanted]
                rows = getattr(dispatch.served(home), side).rows[server]
                assert [at for start, stop in rows.intervals for at in range(start, stop)] == lie
                assert all(one[1] < other[0] for one, other in pairwise(rows.intervals)), "joined where they touch"
                assert places.counts[home] == len(lie)
                assert home == server or moved[home, server] == len(lie)
    return cells


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
    pieces = random_pieces(homes, seed)
    made = plan_of(homes, pieces)
    legality.check(made)
    compare(homes, Dispatch(made), pieces)


def test_without_tasks_nobody_asks():
    homes = Homes.of(SequencePlan((Documents.single(6),), Mask(), Zigzag(), 6, 2))
    dispatch = Dispatch(plan_of(homes, []))
    served = dispatch.served(1)
    assert served.local == served.remote == () and dispatch.cells(1) == 0
    assert [len(side.rows[home]) for side in (served.queries, served.keys) for home in range(2)] == [0] * 4


@pytest.mark.parametrize("world", [8, 64])
def test_what_is_worked_out_goes_with_cuts_and_not_with_tokens(world):
    """32,768 tokens a rank; a token of each would be 32,768 pieces a rank, in as many passes as there are ranks."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(100, 9000, size=world * 32768)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), world * 32768))]
    documents = (Documents.from_lengths([*lengths.tolist(), world * 32768 - int(lengths.sum())]),)
    plan = SequencePlan(documents, Mask(), Zigzag(), world * 32768, world)
    there, _ = dispatches(plan, "cad", AttentionShape())
    runs = sum(1 + int((np.diff(plan.positions(rank)) != 1).sum()) for rank in range(world))
    cuts = len(documents[0]) + 2 * world
    assert runs <= 2 * world and len(home_of(plan).rank) <= cuts
    ranks = [there.plan.rank(rank) for rank in range(world)]
    assert sum(len(one.group) for rank in ranks for one in (rank.local, rank.remote)) <= 4 * cuts


def test_an_operator_gets_what_was_prepared_and_anything_else_is_said(caplog):
    """It would plan again in the middle of a step, and nobody would know."""
    plan, ring = SequencePlan((Documents.single(16),), Mask(), Contiguous(), 16, 1), group_of(None)
    q, k = torch.zeros(1, 16, 4, 8), torch.zeros(1, 16, 2, 8)
    context = AttentionContext(plan, ring, kernel_for("auto", q, k), 1.0, DEFAULT, plan)
    ahead = prepared(plan, "cad", AttentionShape(4, 2, 8, 4))
    assert dispatches_of(context, "cad", q, k) is ahead
    assert dispatches_of(context, "zeppelin", q, k) is not ahead, "nobody prepared for this planner"
    assert not caplog.records
    other = dispatches_of(context, "cad", q.double(), k.double())
    assert other is not ahead and "planned now, in the step" in caplog.text
    assert dispatches_of(context, "cad", q.double(), k.double()) is other and len(caplog.records) == 1


def test_a_plan_that_was_dispatched_does_not_outlive_its_batch():
    plan = SequencePlan((Documents.from_lengths([90, 7, 31]),), Mask(), Contiguous(), 128, 4)
    there, _ = dispatches(plan, "cad", AttentionShape())
    there.served(2)
    kept = weakref.ref(plan)
    del plan, there
    gc.collect()
    assert kept() is None
