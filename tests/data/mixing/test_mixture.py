"""Mixtures: shares at every prefix, each token once an epoch of its source, one stream on any mesh."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import DataConfig
from longctx.config.parsing import parse
from longctx.data import Corpus
from longctx.data.loader import Loader
from longctx.data.mixing.build import packing_of_run, require_epochs
from longctx.data.mixing.interleave import Interleave
from longctx.data.mixing.mixture import Mixture
from longctx.data.mixing.source import join
from longctx.errors import ConfigError
from longctx.sequence import IGNORE
from tests.data.test_packing import numbered


def mixed(lengths: list[list[int]], shares: list[Any], seq_len: int = 8, **rest: Any) -> Mixture:
    """A mixture of corpora whose tokens are their positions among all of them."""
    corpora = {f"s{k}": numbered(own) for k, own in enumerate(lengths)}
    sources = {
        name: {"path": "x", "weight": weight, **rest.pop(name, {})}
        for name, weight in zip(corpora, shares, strict=True)
    }
    config = parse(DataConfig, {"source": "mixture", "mixture": sources, "seq_len": seq_len, **rest})
    made = packing_of_run(config, join(corpora, 10**6), seed=3)
    assert isinstance(made, Mixture)
    return made


SHARES = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(weights=SHARES, start=st.integers(0, 10**12))
def test_rows_are_dealt_by_share_at_every_prefix_and_none_is_left_out(weights: list[int], start: int) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    dealt = Interleave(shares)
    before = dealt.counts(start)
    for row in range(start, start + 300):
        place = dealt.place(row)
        assert place.row == before[place.source], "a source's rows come one after another"
        before[place.source] += 1
    assert before == dealt.counts(start + 300) and sum(before) == start + 300
    assert all(abs(count - share * (start + 300)) < 2 for count, share in zip(before, shares, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=1, max_size=3),
    seq_len=st.integers(1, 12),
    balance=st.sampled_from(["none", "rows"]),
)
def test_each_source_has_every_token_once_an_epoch(lengths: list[list[int]], seq_len: int, balance: str) -> None:
    mixture = mixed(lengths, [1 + k for k in range(len(lengths))], seq_len, balance=balance)
    firsts = np.cumsum([0, *map(sum, lengths)])
    for k, part in enumerate(mixture.parts):
        rows = sum(lengths[k])  # as many epochs as a row has tokens
        seen: Counter[int] = Counter()
        for row in range(rows):
            seen.update(part.packing.row(row)[0].tolist())
        # The tokens of a part that is joined are those it had alone, for each corpus counts from 0.
        assert seen == Counter(dict.fromkeys(range(int(firsts[k + 1] - firsts[k])), seq_len))


def test_shares_hold_over_ten_million_tokens_in_tokens_and_in_documents() -> None:
    rng = np.random.default_rng(0)
    own = [rng.integers(1, 20_000, 300).tolist(), rng.integers(1, 100, 3000).tolist(), [40_000] * 20]
    for by in ("tokens", "documents"):
        mixture = mixed(own, [0.6, 0.3, 0.1], 1024, weights=by)
        samples = 10**7 // 1024
        used = mixture.usage(samples)
        asked = np.array([0.6, 0.3, 0.1])
        if by == "documents":
            asked = asked * [np.mean(lengths) for lengths in own]
        assert np.allclose([one.rows / samples for one in used], asked / asked.sum(), atol=1e-3)
        met = Counter(mixture.interleave.place(index).source for index in range(samples))
        assert [met[k] for k in range(3)] == [one.rows for one in used]


def test_longer_documents_come_as_often_as_their_bucket_says() -> None:
    mixture = mixed([[2, 5, 9, 30]], [1], 1, s0={"repeat_longer": {4: 2, 9: 5}})
    packing = mixture.parts[0].packing
    seen = Counter(packing.row(row)[0].item() for row in range(packing.epoch_tokens))
    assert [seen[token] for token in range(46)] == [1] * 2 + [2] * 14 + [5] * 30
    assert "2 times above 4 5 times above 9" in mixture.order


def test_two_worlds_have_one_stream_and_go_on_past_an_epoch() -> None:
    lengths, weights = [[7, 1, 30, 12], [5] * 9, [100]], [1, 2, 0.5]

    def batches(world: int, first: int, steps: int) -> list[list[int]]:
        ranks = [Loader(mixed(lengths, weights), 4, rank, world) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict({**rank.state_dict(), "next_sample": first})
        return [
            [token for rank in ranks for batch in next(rank) for token in batch.tokens.flatten().tolist()]
            for _ in range(steps)
        ]

    assert batches(1, 0, 60)[40:] == batches(2, 160, 20) == batches(4, 160, 20)


def test_changed_shares_are_refused_on_resume() -> None:
    state = Loader(mixed([[9], [9]], [1, 1]), 2).state_dict()
    with pytest.raises(ConfigError, match=r"how documents are packed and mixed: .*s0 1\.0, s1 1\.0.*s1 2\.0"):
        Loader(mixed([[9], [9]], [1, 2]), 2).load_state_dict(state)


def test_a_bound_of_epochs_is_kept_and_told() -> None:
    mixture = mixed([[64], [64]], [3, 1], 8, s0={"max_epochs": 2})
    require_epochs(mixture, 20, 2)
    with pytest.raises(
        ConfigError, match=r"s0\.max_epochs=2: 40 sequences take 3\.75 epochs.*train\.steps=(\d+)"
    ) as error:
        require_epochs(mixture, 40, 2)
    steps = int(str(error.value).split("train.steps=")[1].split(",")[0])
    require_epochs(mixture, steps * 2, 2)
    with pytest.raises(ConfigError):
        require_epochs(mixture, (steps + 1) * 2, 2)


def test_a_fraction_is_held_out_of_each_source() -> None:
    mixture = mixed([[3] * 40, [4] * 40], [1, 1], 5, validation={"fraction": 0.2})
    assert mixture.chosen is not None
    assert 0 < np.sum(mixture.chosen < 40) < 40 and 0 < np.sum(mixture.chosen >= 40) < 40
    alone = mixed([[3] * 40], [1], 5, validation={"fraction": 0.2})
    assert alone.chosen is not None and mixture.chosen[mixture.chosen < 40].tolist() == alone.chosen.tolist()
    with pytest.raises(ConfigError, match=r"data\.mixture\.s1 has 1"):
        mixed([[3] * 40, [4]], [1, 1], 5, validation={"fraction": 0.2})


class Endless:
    """Tokens of a corpus of any size that takes no memory: each is its position, modulo 251."""

    dtype = np.dtype(np.uint16)

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Any:
        return (np.arange(part.start, part.stop) % 251).astype(np.uint16)


def sparse(tokens: int, documents: int) -> Corpus:
    bounds = np.linspace(0, tokens, documents + 1).astype(np.int64)
    return Corpus(Endless(tokens), bounds, str, 256, "sparse", content_digest="00" * 32)


def test_far_into_huge_sources_is_as_near_as_the_next() -> None:
    corpora = {"web": sparse(50 * 10**9, 50_000), "code": sparse(3 * 10**9, 200_000)}
    config = parse(DataConfig, {"source": "mixture", "seq_len": 4096, "mixture": {n: {"path": "x"} for n in corpora}})
    mixture = packing_of_run(config, join(corpora, 256), seed=1)
    started = time.thread_time()
    tokens, labels, documents = mixture.sample(10**9)
    assert time.thread_time() - started < 1.0
    assert len(tokens) == 4096 == documents.length
    known = labels != IGNORE
    assert np.array_equal((tokens[known] + 1) % 251, labels[known] % 251)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({}, r"data=mixture has no source of a weight above 0"),
        ({"a": {"path": "x", "weight": 0}}, r"no source of a weight above 0"),
        ({"a": {"path": "x", "weight": -1}}, r"data\.mixture\.a\.weight"),
        ({"a": {}}, r"data\.mixture\.a, read as a section data of its own: data\.path=null"),
        ({"a": {"path": "x", "source": "tex"}}, r"did you mean text"),
        ({"a": {"path": "x", "token_dtype": "uint32"}}, r"token_dtype=uint32 is not read by data=text"),
        ({"a": {"path": "x", "source": "mixture"}}, r"a mixture holds no mixtures"),
        ({"a": {"path": "x", "repeat_longer": {"8k": 2}}}, r"the key '8k' is a string"),
        ({"a": {"path": "x", "repeat_longer": {8: 0}}}, r"repeat_longer\.8=0"),
        ({"a": {"path": "x", "max_epochs": 0}}, r"max_epochs=0 must be above 0"),
        ({"a": {"path": "x", "wieght": 2}}, r"did you mean data\.mixture\.a\.weight"),
    ],
)
def test_mixtures_without_meaning_are_refused_by_name(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DataConfig, {"source": "mixture", "mixture": mixture}, "data.").check()
