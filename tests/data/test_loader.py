"""The loader: the same samples for every mesh, and a position that resumes exactly."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import Corpus
from longctx.data.loader import Loader
from longctx.data.packing import Packing
from longctx.errors import ConfigError, StorageError
from longctx.sequence import IGNORE


def corpus_of(lengths: tuple[int, ...] = (7, 1, 12, 30, 2), first: int = 0) -> Corpus:
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(bounds[-1], dtype=np.uint16) % 50
    tokens[0] = first
    return Corpus(tokens, bounds, str, 50, "test")


def loader(world: int = 1, rank: int = 0, micro: int = 1, global_batch: int = 8, **changed: Any) -> Loader:
    packing = Packing(changed.get("corpus", corpus_of()), changed.get("seq_len", 9), changed.get("seed", 3))
    return Loader(packing, global_batch, rank, world, micro)


def rows(loaders: list[Loader]) -> list[tuple[Any, ...]]:
    """The rows of one step, ranks and micro-batches in order."""
    return [
        (batch.tokens[i].tolist(), batch.labels[i].tolist(), batch.documents[i])
        for each in loaders
        for batch in next(each)
        for i in range(len(batch.tokens))
    ]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_mesh_takes_the_same_global_batch(world: int, micro: int) -> None:
    whole = loader()
    ranks = [loader(world, rank, micro) for rank in range(world)]
    for step in range(5):
        expected = rows([whole])
        assert rows(ranks) == expected
        assert [row[0] for row in expected] == [whole.packing.sample(step * 8 + i)[0].tolist() for i in range(8)]
    assert {json.dumps(each.state_dict()) for each in ranks} == {json.dumps(whole.state_dict())}


def test_batches_have_the_shape_of_the_contract() -> None:
    batches = next(loader(world=2, rank=1, micro=2))
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == (2, 9)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert all(documents.length == 9 for documents in batch.documents)
        assert batch.valid_tokens == int((batch.labels != IGNORE).sum())


def test_steps_are_random_access() -> None:
    forward = loader()
    for number in range(4):
        one, other = next(forward), loader().step(number)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


@settings(max_examples=30, deadline=None)
@given(stop=st.integers(0, 9), old=st.sampled_from([1, 2, 4]), new=st.sampled_from([1, 2, 4, 8]))
def test_a_run_resumes_on_any_mesh(stop: int, old: int, new: int) -> None:
    whole = loader()
    first = [loader(old, rank) for rank in range(old)]
    for _ in range(stop):
        assert rows(first) == rows([whole])
    state = json.loads(json.dumps(first[-1].state_dict()))
    second = [loader(new, rank) for rank in range(new)]
    for each in second:
        each.load_state_dict(state)
    for _ in range(3):
        assert rows(second) == rows([whole])


def test_a_changed_global_batch_goes_on_with_the_next_sample() -> None:
    before, after = loader(), loader(global_batch=4)
    next(before)
    after.load_state_dict(before.state_dict())
    assert rows([after]) == rows([before])[:4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, r"\(train\.seed: 3 in the checkpoint, 4 now\)"),
        ({"seq_len": 18}, r"\(data\.seq_len: 9 in the checkpoint, 18 now\)"),
        ({"corpus": corpus_of(first=1)}, r"\(corpus SHA-256: '\w{64}' in the checkpoint, '\w{64}' now\)"),
        ({"corpus": corpus_of((7, 1, 30, 12, 2))}, r"\(corpus SHA-256: [^;]*\)"),
        (
            {"corpus": corpus_of((7, 1))},
            r"documents in the corpus: 5 .*, 2 now; tokens in the corpus: 52 .*, 8",
        ),
    ],
)
def test_changed_data_are_refused_with_the_difference(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(**changed).load_state_dict(loader().state_dict())


@pytest.mark.parametrize("damage", [{"next_sample": -1}, {"next_sample": "8"}, {"next_sample": True}])
def test_a_damaged_position_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match=f"damaged.*next_sample {damage['next_sample']!r}"):
        loader().load_state_dict({**loader().state_dict(), **damage})
    with pytest.raises(StorageError, match=r"missing \['documents', .*'next_sample'"):
        loader().load_state_dict({})


@pytest.mark.parametrize(
    ("global_batch", "world", "micro", "message"),
    [
        (6, 4, 1, r"train.global_batch=6 .*data-parallel groups 4 .*nearest valid values: 4 or 8"),
        (2, 2, 2, r"train.micro_batch 2\); nearest valid values: 4"),
        (0, 1, 1, "train.global_batch=0 must be at least 1"),
        (4, 1, 0, "train.micro_batch=0 must be at least 1"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(global_batch: int, world: int, micro: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(world, 0, micro, global_batch)
