"""Documents and the band of a mask, against their definition cell by cell."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ConfigError, DataError
from longctx.sequence import Documents, Mask
from tests.sequence.brute_force import allowed, packings


@given(st.data())
def test_key_range_is_the_definition(data):
    length = data.draw(st.integers(1, 24))
    lengths = data.draw(packings(length))
    mask = Mask(data.draw(st.booleans()), data.draw(st.one_of(st.none(), st.integers(1, length + 2))))
    queries = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=8)), dtype=np.int64)
    start, stop = mask.key_range(queries, Documents.from_lengths(lengths))
    for query, first, last in zip(queries.tolist(), start.tolist(), stop.tolist(), strict=True):
        seen = [key for key in range(length) if allowed(list(lengths), mask, query, key)]
        assert list(range(first, last)) == seen


def test_documents_describe_themselves():
    documents = Documents.from_lengths((3, 1, 4))
    assert (len(documents), documents.length, documents.lengths.tolist()) == (3, 8, [3, 1, 4])
    assert documents == Documents(np.array([0, 3, 4, 8])) and hash(documents) == hash(Documents([0, 3, 4, 8]))
    assert documents != Documents.from_lengths((4, 4)) and documents != (3, 1, 4)
    assert not documents.cu_seqlens.flags.writeable
    assert len(Documents.single(0)) == 0 and Documents.single(0).length == 0
    assert Documents.single(5) == Documents.from_lengths([5])


def test_bounds_of_padding_are_empty():
    start, stop = Documents.from_lengths((2, 3)).bounds_of(np.arange(7))
    assert start.tolist() == [0, 0, 2, 2, 2, 5, 6] and stop.tolist() == [2, 2, 5, 5, 5, 5, 6]
    start, stop = Documents.from_lengths(()).bounds_of(np.arange(2))
    assert start.tolist() == stop.tolist() == [0, 1]


@pytest.mark.parametrize("bounds", [[], [1, 3], [0, 2, 2], [0, 3, 1], [[0, 1], [0, 1]], [0, 0]])
def test_malformed_boundaries_are_refused(bounds):
    with pytest.raises(DataError, match="must start at 0 and increase strictly; leave out empty documents"):
        Documents(np.array(bounds, dtype=np.int64))


@pytest.mark.parametrize("window", [0, -5])
def test_a_window_without_the_query_itself_is_refused(window):
    with pytest.raises(ConfigError, match=rf"attention window {window} must be at least 1.*null for no window"):
        Mask(window=window)
