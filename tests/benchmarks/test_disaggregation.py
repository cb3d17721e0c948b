"""``python -m benchmarks disaggregation``: its batch, its ways of attending, and that what is wrong is not timed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.commands import disaggregation as bench_disaggregation
from benchmarks.commands.disaggregation import require_exact
from benchmarks.disaggregation import WAYS, Problem, attend, per_document, skewed
from longctx.errors import NumericsError


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 5),
    share=st.integers(1, 60),
    longest=st.integers(1, 60),
    low=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_ranks_have_equal_tokens_and_the_first_the_longest(world, share, longest, low, seed):
    longest = min(longest, share)
    shares = skewed(world, world * share, longest, (low, low + 4), seed)
    assert [sum(lengths) for lengths in shares] == [share] * world
    assert shares[0][0] == longest
    assert all(1 <= length <= low + 4 for lengths in shares for length in lengths if length != longest)
    assert shares == skewed(world, world * share, longest, (low, low + 4), seed)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 23), min_size=1, max_size=6), world=st.integers(1, 4))
def test_every_document_is_in_zigzag_over_all_ranks(lengths, world):
    problem = Problem((tuple(lengths), *((1,) for _ in range(world - 1))), 1, 1, 2)
    layout, total = per_document(problem), problem.documents.length
    held = [layout.positions(total, world, rank) for rank in range(world)]
    assert sorted(np.concatenate(held).tolist()) == list(range(total))
    for start, stop in zip(problem.documents.cu_seqlens[:-1], problem.documents.cu_seqlens[1:], strict=True):
        of_document = [int(((start <= own) & (own < stop)).sum()) for own in held]
        assert max(of_document) - min(of_document) <= 2  # leftovers, less than two for each rank
    counts = list(map(len, held))
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("shares", [((31,), (5, 1, 9, 16)), ((1,), (1,)), ((40, 7), (13, 34), (47,))])
def test_all_ways_are_exact(shares):
    require_exact(Problem(shares, 4, 2, 6), list(WAYS))


def test_what_is_wrong_is_not_timed(monkeypatch):
    def off(problem, way):
        out, *grads = attend(problem, way)
        return [out, grads[0] * (1 + 1e-9), *grads[1:]]

    monkeypatch.setattr(bench_disaggregation, "attend", off)
    with pytest.raises(NumericsError, match=r"zigzag per document, ring is off by .* in float64; it is not timed"):
        require_exact(Problem(((20,), (3, 17)), 2, 1, 4), ["zigzag_ring"])


@pytest.mark.gloo
def test_a_small_batch_by_all_ways(bench):
    options = "--batch-tokens 192 --longest 90 --short 1,9 --layer 4,2,8 --rounds 1 --json"
    done = bench("disaggregation", *options.split(" "))
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    lengths = np.concatenate(told["problem"]["shares"])
    rows = {row["way"]: row for row in told["rows"]}
    assert list(rows) == [way.title for way in WAYS.values()]
    for row in rows.values():
        assert sum(row["cells"]) == (lengths * (lengths + 1) // 2).sum()
        assert row["error"] < 1e-5
        assert min(row[what]["median"] for what in ("attention", "work", "block")) > 0
    alone = rows["plain data parallelism"]
    assert alone["bytes"] == [0, 0]
    for name in ("disaggregated", "zigzag_ring", "zigzag_gather"):
        assert sum(rows[WAYS[name].title]["bytes"]) > 0
    assert max(rows["disaggregated (cad)"]["cells"]) < max(alone["cells"])
