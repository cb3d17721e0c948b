"""Rows dealt by attention work, and documents packed by it: nothing lost, equal tokens, the same for every mesh."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import Balance, Corpus
from longctx.data.balance import WINDOW, deal_rows, pack_pieces
from longctx.data.loader import Loader
from longctx.data.packing import Packing
from longctx.errors import ConfigError
from longctx.sequence import IGNORE, Batch

ROWS, DOCUMENTS = Balance(), Balance(documents=True)
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> Corpus:
    """A corpus whose token is its own position."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(bounds[-1])
    return Corpus(np.arange(total, dtype=np.uint32), bounds, str, total, "test")


def skewed() -> Corpus:
    """Documents of hundreds of tokens among many short ones."""
    generator = np.random.default_rng(0)
    return numbered([*generator.integers(200, 400, 30).tolist(), *generator.integers(1, 60, 900).tolist()])


def pairs(packing: Packing, samples: range) -> Counter[tuple[int, int]]:
    """Tokens with their labels."""
    counted: Counter[tuple[int, int]] = Counter()
    for index in samples:
        tokens, labels, _ = packing.sample(index)
        counted.update(zip(tokens.tolist(), labels.tolist(), strict=True))
    return counted


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, window=st.one_of(st.none(), st.integers(1, 40)))
def test_cells_are_those_of_the_mask(lengths: list[int], window: int | None) -> None:
    counted = [sum(min(i + 1, window or i + 1) for i in range(length)) for length in lengths]
    assert Balance(window=window).cells(np.array(lengths)).tolist() == counted


@settings(max_examples=200, deadline=None)
@given(ranks=st.integers(1, 5), micro=st.integers(1, 4), batches=st.integers(1, 4), data=st.data())
def test_every_row_goes_out_once_and_evenly(ranks: int, micro: int, batches: int, data: Any) -> None:
    count = ranks * micro * batches
    works = np.array(data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count)))
    rows = deal_rows(works, ranks, micro)
    assert rows.shape == (ranks, batches, micro)
    assert sorted(rows.ravel().tolist()) == list(range(count))
    assert np.array_equal(rows, deal_rows(works, ranks, micro))
    sums = works[rows].sum(axis=2)
    spread = int(works.max() - works.min())
    # Ranks take rows that follow one another in order of work, so that all gaps together are no more than the range.
    assert np.ptp(sums.sum(axis=1)) <= spread
    assert np.ptp(sums, axis=0).sum() <= spread


def test_rows_of_equal_work_stay_in_order() -> None:
    assert deal_rows(np.full(4, 7), 1, 1).ravel().tolist() == [0, 1, 2, 3]


def test_two_rows_of_a_micro_batch_make_up_for_each_other() -> None:
    works = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    assert works[deal_rows(works, 2, 2)].sum(axis=2).tolist() == [[10, 10], [10, 10]]


@settings(max_examples=150, deadline=None)
@given(seq_len=st.integers(1, 25), rows=st.integers(1, 9), data=st.data())
def test_documents_fill_their_rows_and_are_cut_where_none_has_room(seq_len: int, rows: int, data: Any) -> None:
    left, pieces, total = rows * seq_len, [], 0
    while left:
        length = data.draw(st.integers(1, left))
        pieces.append((total, total + length, total + length + data.draw(st.integers(0, 3))))
        left, total = left - length, total + length
    found = pack_pieces(pieces, rows, seq_len, DOCUMENTS)
    assert [sum(stop - start for start, stop, _ in row) for row in found] == [seq_len] * rows
    tokens = Counter((token, end) for start, stop, end in pieces for token in range(start, stop))
    assert Counter((token, end) for row in found for start, stop, end in row for token in range(start, stop)) == tokens
    assert sum(map(len, found)) <= len(pieces) + rows - 1  # a cut fills a row, and the last row needs none
    assert found == pack_pieces(pieces, rows, seq_len, DOCUMENTS)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 20), seed=st.integers(0, 9), windows=st.integers(1, 2))
def test_windows_hold_the_tokens_and_labels_of_the_stream(
    lengths: list[int], seq_len: int, seed: int, windows: int
) -> None:
    corpus = numbered(lengths)
    packing = Packing(corpus, seq_len, seed, balance=DOCUMENTS)
    stream = Counter[tuple[int, int]]()
    for index in range(windows * WINDOW):
        tokens, labels, _ = packing.row(index)
        stream.update(zip(tokens.tolist(), labels.tolist(), strict=True))
    assert pairs(packing, range(windows * WINDOW)) == stream
    for index in range(0, windows * WINDOW, 7):
        tokens, labels, documents = packing.sample(index)
        starts = set(documents.cu_seqlens.tolist())
        for place in range(1, seq_len):  # within a document a token's label is the next token
            if place not in starts:
                assert labels[place - 1] == tokens[place] == tokens[place - 1] + 1
        assert all(labels[place] != IGNORE or tokens[place] + 1 in corpus.bounds for place in range(seq_len))


@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 3 * WINDOW), min_size=1, max_size=8))
def test_a_sample_depends_on_nothing_but_its_index(order: list[int]) -> None:
    corpus = numbered([40, 3, 17, 5, 9])
    shared = Packing(corpus, 11, 1, balance=DOCUMENTS)
    for index in order:
        fresh, again = Packing(corpus, 11, 1, balance=DOCUMENTS).sample(index), shared.sample(index)
        assert np.array_equal(fresh[0], again[0])
        assert np.array_equal(fresh[1], again[1])
        assert fresh[2] == again[2]


def loaders(world: int, micro: int, balance: Balance | None, first: int = 0, batch: int = 16) -> list[Loader]:
    made = [Loader(Packing(skewed(), 1000, 3, balance=balance), batch, rank, world, micro) for rank in range(world)]
    for loader in made:
        loader.next_sample = first
    return made


def taken(step: list[list[Batch]]) -> list[list[int]]:
    """Rows of all ranks, in an order of their own."""
    return sorted(row.tolist() for batches in step for batch in batches for row in batch.tokens)


@pytest.mark.parametrize("balance", [ROWS, DOCUMENTS])
def test_every_mesh_takes_the_same_global_batch_and_goes_on_with_it(balance: Balance) -> None:
    (alone,) = loaders(1, 1, balance)
    expected = [taken([next(alone)]) for _ in range(5)]
    for world, micro in ((2, 1), (2, 4), (4, 2), (8, 1)):
        ranks = loaders(world, micro, balance)
        assert [taken([next(rank) for rank in ranks]) for _ in range(3)] == expected[:3]
        resumed = loaders(4, 1, balance)
        for rank in resumed:
            rank.load_state_dict(ranks[-1].state_dict())
        assert [taken([next(rank) for rank in resumed]) for _ in range(2)] == expected[3:]


def test_dealing_rows_changes_no_sample() -> None:
    plain, by_work = loaders(4, 1, None), loaders(4, 1, ROWS)
    for _ in range(3):
        assert taken([next(rank) for rank in plain]) == taken([next(rank) for rank in by_work])


def test_a_checkpoint_of_another_packing_is_refused() -> None:
    (plain,), (by_work,), (anew,) = (loaders(1, 1, balance) for balance in (None, ROWS, DOCUMENTS))
    by_work.load_state_dict(plain.state_dict())  # the same samples
    with pytest.raises(ConfigError, match=r"how documents are packed and mixed: 'as they stream' in the checkpoint"):
        anew.load_state_dict(plain.state_dict())
    before = {name: value for name, value in plain.state_dict().items() if name != "packing"}
    plain.load_state_dict(before)
    with pytest.raises(ConfigError, match="'as they stream' in the checkpoint, 'documents' now"):
        anew.load_state_dict(before)
    (narrow,) = loaders(1, 1, Balance(documents=True, window=100))
    with pytest.raises(ConfigError, match=r"'documents' in the checkpoint, 'documents, attention.window=100' now"):
        narrow.load_state_dict(anew.state_dict())


def imbalance(balance: Balance | None) -> float:
    """Most work of a rank over the mean, over 8 steps of 4 ranks."""
    ranks = loaders(4, 1, balance)
    steps = []
    for _ in range(8):
        works = [
            sum(int(ROWS.cells(row.lengths).sum()) for batch in next(rank) for row in batch.documents) for rank in ranks
        ]
        steps.append(max(works) * len(works) / sum(works))
    return float(np.mean(steps))


def test_work_is_evened_out() -> None:
    plain, rows, documents = (imbalance(balance) for balance in (None, ROWS, DOCUMENTS))
    assert documents < rows < plain
    assert documents - 1 < (plain - 1) / 4
