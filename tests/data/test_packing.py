"""Packing against a naive construction of the endless stream."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import DataConfig
from longctx.data import Corpus, open_corpus
from longctx.data.packing import Packing
from longctx.errors import ConfigError
from longctx.sequence import IGNORE, Documents

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def numbered(lengths: list[int]) -> Corpus:
    """A corpus whose token is its own position, so that every one is recognised wherever it turns up."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(bounds[-1])
    return Corpus(np.arange(total, dtype=np.uint32), bounds, lambda i: f"document {i}", total, "test")


def stream(packing: Packing, samples: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of the first rows, one after another."""
    parts = [packing.row(index) for index in range(samples)]
    return (
        np.concatenate([tokens for tokens, _, _ in parts]).tolist(),
        np.concatenate([labels for _, labels, _ in parts]).tolist(),
    )


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_every_token_once_per_epoch_with_the_right_labels(lengths: list[int], seq_len: int, seed: int) -> None:
    corpus = numbered(lengths)
    epochs = 3
    samples = -(-epochs * corpus.total_tokens // seq_len)
    tokens, labels = stream(Packing(corpus, seq_len, seed), samples)
    ends = set((corpus.bounds[1:] - 1).tolist())
    assert labels == [IGNORE if token in ends else token + 1 for token in tokens]
    for epoch in range(epochs):
        part = tokens[epoch * corpus.total_tokens : (epoch + 1) * corpus.total_tokens]
        assert sorted(part) == list(range(corpus.total_tokens))
        # Whole documents in some order: after every token comes its successor, or another document's start.
        assert all(
            after == before + 1 if before not in ends else after in corpus.bounds for before, after in pairwise(part)
        )


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 40), seed=st.integers(0, 9), index=st.integers(0, 60))
def test_documents_are_the_pieces_of_the_row(lengths: list[int], seq_len: int, seed: int, index: int) -> None:
    corpus = numbered(lengths)
    tokens, labels, documents = Packing(corpus, seq_len, seed).row(index)
    assert tokens.dtype == labels.dtype == np.int64
    starts = [0] + [i for i in range(1, seq_len) if tokens[i] in corpus.bounds]
    assert documents.cu_seqlens.tolist() == [*starts, seq_len]
    unmasked = Packing(corpus, seq_len, seed, document_mask=False).row(index)
    assert unmasked[2] == Documents.single(seq_len)
    assert np.array_equal(unmasked[0], tokens)
    assert np.array_equal(unmasked[1], labels)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 40), order=st.permutations(range(12)))
def test_a_sample_depends_on_nothing_but_its_index(lengths: list[int], seq_len: int, order: list[int]) -> None:
    shared = Packing(numbered(lengths), seq_len, 1)
    for index in order:
        fresh = Packing(numbered(lengths), seq_len, 1).sample(index)
        again = shared.sample(index)
        assert np.array_equal(fresh[0], again[0])
        assert np.array_equal(fresh[1], again[1])
        assert fresh[2] == again[2]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), seed=st.integers(0, 9), windows=st.integers(1, 4))
def test_samples_are_rows_in_another_order_within_each_window(
    lengths: list[int], seq_len: int, seed: int, windows: int
) -> None:
    packing = Packing(numbered(lengths), seq_len, seed)
    size = max(1, sum(lengths) // seq_len)
    rows = [packing.row_of(index) for index in range(windows * size)]
    for window in range(windows):
        part = range(window * size, (window + 1) * size)
        assert sorted(rows[window * size : (window + 1) * size]) == list(part)
    last = windows * size - 1
    assert np.array_equal(packing.sample(last)[0], packing.row(rows[last])[0])


def test_neighbours_of_a_long_document_are_read_far_apart() -> None:
    packing = Packing(numbered([1000]), 10, 0)
    rows = [packing.row_of(index) for index in range(100)]
    assert rows != sorted(rows)
    assert sum(abs(a - b) == 1 for a, b in pairwise(rows)) < 10


def test_seeds_and_epochs_differ_in_their_order() -> None:
    corpus = numbered([1] * 50)
    orders = {tuple(Packing(corpus, 50, seed).sample(epoch)[0].tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_never_changes_between_versions() -> None:
    assert Packing(numbered([1] * 8), 8, 0).sample(0)[0].tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert Packing(numbered([1] * 8), 8, 7).sample(3)[0].tolist() == [7, 1, 6, 0, 4, 2, 3, 5]


def test_far_ahead_is_as_near_as_the_next() -> None:
    corpus = open_corpus(DataConfig(), 256)
    packing = Packing(corpus, 4096, 0)
    # Epoch after epoch this would never end.
    for index in (10**9, 10**9 + 1, 10**12):
        packing.sample(index)
    raw, flat = packing.sample(10**9)[0], corpus.tokens.tobytes()
    piece = raw[: packing.sample(10**9)[2].cu_seqlens[1]].astype(np.uint8).tobytes()
    assert piece in flat


def test_only_the_last_epochs_are_kept() -> None:
    packing = Packing(numbered([3, 2]), 10, 0)
    for index in range(20):
        packing.sample(index)
    assert len(packing._epochs) == 2


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_length_below_one_is_refused(seq_len: int) -> None:
    with pytest.raises(ConfigError, match=f"data.seq_len={seq_len}: .*at least 1"):
        Packing(numbered([1]), seq_len, 0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.seed=-3.*train.seed=3"):
        Packing(numbered([1]), 1, -3)
