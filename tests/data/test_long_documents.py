"""Documents longer than a sequence: what is left out is what is counted, packed, mixed or held out in any way."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import DataConfig
from longctx.config.parsing import parse
from longctx.data.balance import WINDOW, Balance
from longctx.data.held_out import split
from longctx.data.loader import Loader
from longctx.data.long_documents import count_long
from longctx.data.mixing.build import packing_of_run
from longctx.data.packing import Packing
from longctx.errors import ConfigError
from longctx.sequence import IGNORE
from tests.data.mixing.test_mixture import mixed
from tests.data.test_packing import LENGTHS, numbered, stream


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 14), seed=st.integers(0, 2**40))
def test_long_documents_lose_the_tokens_that_are_counted_and_no_other(
    lengths: list[int], seq_len: int, seed: int
) -> None:
    corpus = numbered(lengths)
    kept = [length for length in lengths if length <= seq_len]
    for policy, expected in (("truncate", [min(length, seq_len) for length in lengths]), ("skip", kept)):
        if policy == "skip" and max(kept, default=0) < 2:
            with pytest.raises(ConfigError, match="leaves nothing to learn"):
                Packing(corpus, seq_len, seed, long_documents=policy)
            continue
        packing = Packing(corpus, seq_len, seed, long_documents=policy)
        counted = count_long(DataConfig(seq_len=seq_len, long_documents=policy), corpus, None)
        assert packing.epoch_tokens == sum(expected) == sum(lengths) - counted["tokens_left_out"]
        assert counted["documents"] == len(lengths) - len(kept) and policy in packing.order
        tokens, labels = stream(packing, packing.epoch_tokens)  # as many whole epochs as a row has tokens
        own = [
            start + offset
            for start, length in zip(corpus.bounds.tolist(), lengths, strict=False)
            if policy == "truncate" or length <= seq_len
            for offset in range(min(length, seq_len))
        ]
        assert sorted(tokens) == sorted(own * seq_len)
        ends = {start + min(n, seq_len) - 1 for start, n in zip(corpus.bounds.tolist(), lengths, strict=False)}
        assert labels == [IGNORE if token in ends else token + 1 for token in tokens]


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    seq_len=st.integers(2, 6),
    policy=st.sampled_from(["truncate", "skip"]),
)
def test_packed_by_work_the_same_tokens_are_left_out(lengths: list[int], seq_len: int, policy: str) -> None:
    lengths = [*lengths, 2]
    packing = Packing(numbered(lengths), seq_len, 5, balance=Balance(documents=True), long_documents=policy)
    seen: Counter[int] = Counter()
    for index in range(WINDOW * packing.epoch_tokens):  # whole windows, and whole epochs
        tokens, labels, _ = packing.sample(index)
        seen.update(tokens.tolist())
        assert all(label in (IGNORE, token + 1) for token, label in zip(tokens.tolist(), labels.tolist(), strict=True))
    starts = packing.corpus.bounds.tolist()
    kept = [
        start + offset
        for start, length in zip(starts, lengths, strict=False)
        if policy == "truncate" or length <= seq_len
        for offset in range(min(length, seq_len))
    ]
    assert seen == Counter(dict.fromkeys(kept, WINDOW * seq_len))


def test_each_source_of_a_mixture_leaves_out_its_own() -> None:
    asked = {"s0": {"repeat_longer": {4: 3}}, "long_documents": "truncate"}
    mixture = mixed([[30, 3], [2, 9, 40]], [1, 1], 8, **asked)
    assert [(part.tokens, part.packing.epoch_tokens) for part in mixture.parts] == [(11, 27), (18, 18)]
    for part, allowed in zip(mixture.parts, ({*range(8), *range(30, 33)}, {0, 1, *range(2, 10), *range(11, 19)})):
        rows = range(part.packing.epoch_tokens)
        assert {token for row in rows for token in part.packing.row(row)[0].tolist()} == allowed
    counted = count_long(DataConfig(seq_len=8, long_documents="truncate"), mixture.corpus, mixture.chosen)
    assert counted == {"policy": "truncate", "documents": 3, "tokens_left_out": 22 + 1 + 32}
    with pytest.raises(ConfigError, match=r"data\.mixture\.s1: data\.long_documents=skip leaves nothing to learn"):
        mixed([[30, 3], [9, 40]], [1, 1], 8, long_documents="skip")


@pytest.mark.parametrize("policy", ["split", "truncate", "skip"])
def test_what_is_held_out_is_neither_trained_on_nor_counted(policy: str) -> None:
    corpus = numbered([3, 20, 5, 40] * 10)
    asked = {"seq_len": 8, "long_documents": policy, "validation": {"fraction": 0.3}}
    config = parse(DataConfig, asked)
    packing = packing_of_run(config, corpus, seed=1)
    trained, held = split(corpus, 0.3)
    lengths = corpus.lengths[trained].tolist()
    counted = count_long(config, corpus, packing.chosen)
    assert counted["documents"] == sum(length > 8 for length in lengths)
    assert packing.epoch_tokens == sum(lengths) - counted["tokens_left_out"]
    tokens = {token for row in range(packing.epoch_tokens) for token in packing.sample(row)[0].tolist()}
    assert not any(set(range(*corpus.bounds[one : one + 2].tolist())) & tokens for one in held.tolist())


def test_a_run_goes_on_only_as_it_was_begun() -> None:
    def loader(policy: str) -> Loader:
        return Loader(Packing(numbered([3, 20, 5]), 8, 3, long_documents=policy), 2)

    states = {policy: loader(policy).state_dict() for policy in ("split", "truncate", "skip")}
    for policy, state in states.items():
        for now in states:
            if now == policy:
                loader(now).load_state_dict(state)
                continue
            with pytest.raises(ConfigError, match=r"how documents are packed and mixed: .* in the checkpoint, .* now"):
                loader(now).load_state_dict(state)
    before = {key: states["split"][key] for key in states["split"] if key not in ("packing", "chosen", "tokenizer")}
    loader("split").load_state_dict(before)
    with pytest.raises(ConfigError, match=r"now.*data\.long_documents=truncate|data\.long_documents=truncate.*now"):
        loader("truncate").load_state_dict(before)
