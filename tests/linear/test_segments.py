"""Segments and chunks against counts token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.linear.chunks import chunks_of, cut_pieces
from longctx.linear.segments import chain_of
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Striped, Zigzag

LAYOUTS = st.sampled_from([Contiguous(), Zigzag(), Striped(1), Striped(3), Striped(8)])


@st.composite
def plans(draw) -> SequencePlan:
    length = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        lengths, left = [], draw(st.integers(0, length))
        while left:
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        rows.append(Documents.from_lengths(lengths))
    return SequencePlan(rows, Mask(), draw(LAYOUTS), length, draw(st.integers(1, 6)))


def numbers(documents: Documents, length: int) -> np.ndarray:
    """Each position's document; padding has numbers of its own."""
    inside = np.repeat(np.arange(len(documents)), documents.lengths)
    return np.concatenate([inside, -1 - np.arange(length - documents.length)])


@given(plan=plans())
def test_the_chain_is_the_sequence_and_knows_who_reads_whom(plan):
    chain = chain_of(plan)
    held = np.concatenate([np.arange(one.start, one.stop) for one in chain.segments])
    assert np.array_equal(held, np.arange(plan.length))
    for place, segment in enumerate(chain.segments):
        own = plan.positions(segment.rank)[segment.first : segment.first + segment.tokens]
        assert np.array_equal(own, np.arange(segment.start, segment.stop))
        assert place == 0 or chain.segments[place - 1].rank != segment.rank, "runs are maximal"
    for row, documents in enumerate(plan.documents):
        of = numbers(documents, plan.length)
        for place, one in enumerate(chain.segments):
            before = of[one.start - 1] if one.start else None
            assert chain.enters[row, place] == (before == of[one.start])
            assert chain.keep[row, place] == bool(chain.enters[row, place] and before == of[one.stop - 1])
    for reader, its in enumerate(chain.segments):
        for place, one in enumerate(chain.segments):
            reads = place < reader and any(
                numbers(documents, plan.length)[one.stop - 1] == numbers(documents, plan.length)[its.start]
                for documents in plan.documents
            )
            assert (chain.reads[reader] <= place < reader) == reads
            if one.rank != its.rank:
                assert not reads or place in chain.sent(one.rank, its.rank)
                assert not reads or reader in chain.returned(its.rank, one.rank)


@given(plan=plans(), chunk=st.integers(1, 20), data=st.data())
def test_chunks_hold_every_token_once_and_mask_by_documents(plan, chunk, data):
    rank = data.draw(st.integers(0, plan.world - 1))
    chunks, positions = chunks_of(plan, rank, chunk, torch.device("cpu")), plan.positions(rank)
    grid = np.full((chunks.count * chunks.width,), -1)
    grid[chunks.slots.numpy()] = positions
    grid = grid.reshape(chunks.count, chunks.width)
    assert chunks.width <= chunk and sorted(grid[grid >= 0].tolist()) == positions.tolist()
    for row, documents in enumerate(plan.documents):
        of, batch = numbers(documents, plan.length), min(row, len(chunks.real) - 1)
        for n, places in enumerate(grid.tolist()):
            tokens = [place for place in places if place >= 0]
            assert places == tokens + [-1] * (chunks.width - len(tokens)) and tokens
            last, first = tokens[-1], tokens[0]
            assert bool(chunks.keep[batch, n]) == (first > 0 and of[first - 1] == of[last])
            for i, place in enumerate(tokens):
                assert bool(chunks.real[batch, n, i]) == (place < documents.length)
                assert bool(chunks.head[batch, n, i]) == (first > 0 and of[first - 1] == of[place])
                assert bool(chunks.tail[batch, n, i]) == (of[last] == of[place])
                seen = [j <= i and of[other] == of[place] for j, other in enumerate(tokens)]
                assert chunks.same[batch, n, i, : len(tokens)].tolist() == seen


@pytest.mark.parametrize(
    ("layout", "world", "segments"), [(Contiguous(), 4, 4), (Zigzag(), 4, 7), (Striped(8), 2, 8), (Contiguous(), 1, 1)]
)
def test_counts_of_segments(layout, world, segments):
    plan = SequencePlan((Documents.single(64),), Mask(), layout, 64, world)
    assert len(chain_of(plan)) == segments


@given(plan=plans(), chunk=st.integers(1, 20))
def test_cutting_and_joining_are_inverse_but_for_padding(plan, chunk):
    chunks = chunks_of(plan, 0, chunk, torch.device("cpu"))
    tokens = torch.randn(len(plan.documents), plan.shard, 2, 3)
    joined = chunks.join(chunks.cut(tokens))
    positions = plan.positions(0)
    for row, documents in enumerate(plan.documents):
        real = int((positions < documents.length).sum())
        assert torch.equal(joined[row, :real], tokens[row, :real]) and not joined[row, real:].any()


@given(plan=plans(), chunk=st.integers(1, 9), tokens=st.integers(1, 30), data=st.data())
def test_pieces_hold_all_chunks_of_a_rank_in_order(plan, chunk, tokens, data):
    chain, rank = chain_of(plan), data.draw(st.integers(0, plan.world - 1))
    segments = [chain.segments[place] for place in chain.places_of(rank)]
    pieces = cut_pieces(segments, plan.documents, chunk, tokens)
    edges = [(piece.rows.start, piece.rows.stop) for piece in pieces.parts]
    assert [edge for edges_of in edges for edge in edges_of][1:-1] == [
        stop for _, stop in edges[:-1] for _ in range(2)
    ], "rows follow each other"
    assert (edges[0][0], edges[-1][1]) == (0, len(plan.positions(rank)))
    for start, stop in edges:
        assert stop - start <= max(chunk, tokens)
    # Spans follow each other in their segments: cut again and put together, they are the segments.
    spans = [len(piece.chunks.runs) for piece in pieces.parts]
    assert [stop for _, stop in pieces.runs] == [start for start, _ in pieces.runs[1:]] + [sum(spans)] * bool(segments)
    lengths = [
        int((piece.chunks.segment[piece.chunks.slots // piece.chunks.width] == run).sum())
        for piece in pieces.parts
        for run in range(len(piece.chunks.runs))
    ]
    assert [sum(lengths[start:stop]) for start, stop in pieces.runs] == [segment.tokens for segment in segments]
    # A span ends inside its segment at the end of a whole chunk.
    for start, stop in pieces.runs:
        assert all(length % chunk == 0 for length in lengths[start : stop - 1])


@given(plan=plans(), chunk=st.integers(1, 20))
def test_what_is_full_needs_no_padding_and_no_mask(plan, chunk):
    chunks = chunks_of(plan, 0, chunk, torch.device("cpu"))
    valid = all(int((plan.positions(0) < row.length).sum()) == plan.shard for row in plan.documents)
    even = all(
        segment.tokens % chunks.width == 0
        for segment in map(chain_of(plan).segments.__getitem__, chain_of(plan).places_of(0))
    )
    assert chunks.full == (valid and even and len(plan.positions(0)) == plan.shard)
