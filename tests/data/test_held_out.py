"""Documents held out of training: a fixed split, and each of their labels once in every validation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.held_out import HeldOut, packing_of, split
from longctx.data.loader import Loader
from longctx.data.packing import Packing
from longctx.errors import ConfigError
from longctx.sequence import IGNORE
from tests.data.test_packing import numbered

LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=12)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, fraction=st.floats(1e-9, 0.999))
def test_a_split_is_a_partition_that_later_documents_do_not_change(lengths: list[int], fraction: float) -> None:
    kept, held = split(numbered(lengths), fraction)
    assert sorted([*kept, *held]) == list(range(len(lengths))) and len(kept) and len(held)
    more = split(numbered([*lengths, 3, 4, 5]), fraction)[1]
    if len(held) > 1 and len(kept) > 1:  # neither side had to be given a document
        assert more[more < len(lengths)].tolist() == held.tolist()


def test_a_split_takes_its_share_of_many_documents_and_refuses_one() -> None:
    assert 430 < len(split(numbered([2] * 10_000), 0.05)[1]) < 570
    with pytest.raises(ConfigError, match="the corpus has 1"):
        split(numbered([9]), 0.5)


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS,
    seq_len=st.integers(1, 40),
    world=st.integers(1, 3),
    micro=st.integers(1, 2),
    turns=st.integers(1, 2),
    sequences=st.none() | st.integers(1, 4),
)
def test_a_pass_counts_every_label_once_on_any_mesh(
    lengths: list[int], seq_len: int, world: int, micro: int, turns: int, sequences: int | None
) -> None:
    corpus = numbered(lengths)
    chosen = split(corpus, 0.4)[1]
    batch = world * micro * turns

    def packing() -> Packing:
        return packing_of(corpus, chosen, seq_len, document_mask=True)

    seen: Counter[tuple[int, int]] = Counter()
    ranks = [HeldOut(packing(), batch, rank, world, micro, sequences) for rank in range(world)]
    for one in ranks:
        for _ in range(one.steps):
            batches = one.batches(one.next_sample)
            assert [b.tokens.shape for b in batches] == [(micro, seq_len)] * turns
            for held in batches:
                counted = held.labels != IGNORE
                seen.update(zip(held.tokens[counted].tolist(), held.labels[counted].tolist(), strict=True))
            one.advance()
        assert one.next_sample == 0, "the next pass is the same"
    own = [np.arange(corpus.bounds[i], corpus.bounds[i + 1] - 1) for i in chosen]
    expected = Counter((token, token + 1) for token in np.concatenate(own).tolist())
    if sequences is None or sequences * seq_len >= ranks[0].packing.epoch_tokens:
        assert seen == expected
    else:
        assert not seen - expected, "a label is counted twice, or is none of the held-out documents'"


def test_training_never_sees_what_is_held_out() -> None:
    corpus = numbered([3, 4, 5, 6, 7, 8, 9, 10])
    kept, held = split(corpus, 0.3)
    loader = Loader(Packing(corpus, 11, 0, chosen=kept), 4)
    met = {token for _ in range(12) for batch in next(loader) for token in batch.tokens.flatten().tolist()}
    assert met == set(np.concatenate([np.arange(corpus.bounds[i], corpus.bounds[i + 1]) for i in kept]).tolist())
    whole = Loader(Packing(corpus, 11, 0), 4)
    with pytest.raises(ConfigError, match=r"documents that data\.validation\.fraction leaves: 'all' in the checkpoint"):
        loader.load_state_dict(whole.state_dict())
    assert len(held)
