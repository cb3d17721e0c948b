"""The audit against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx.config import Config, DataConfig
from longctx.data.loader import Loader
from longctx.data.mixing.audit import audit
from longctx.data.mixing.build import packing_of_run
from tests.data.mixing.test_mixture import mixed
from tests.data.test_packing import numbered


def test_context_cuts_and_work_are_those_of_the_samples() -> None:
    config = replace(Config(), data=DataConfig(seq_len=8))
    config = replace(config, train=replace(config.train, steps=1, global_batch=2))
    corpus = numbered([16])  # two rows, one piece each
    found = audit(config, corpus, Loader(packing_of_run(config.data, corpus, 0), 2, 0, 2))
    assert found["usable_context"] == {"1": 6 / 8, "2": 5 / 8, "4": 3 / 8, "8": 0.0}
    assert (found["pieces"], found["cut_pieces"], found["padding"]) == (2, 1, 0.0)
    assert found["work"] == {"mean": 36, "p50": 36, "p99": 36, "max_over_mean": 1, "balance_over_dp": 1}
    assert found["lengths"] == [{"from": 16, "documents": 1, "tokens": 16}]
    assert found["long_documents"] == {"policy": "split", "documents": 1, "tokens_left_out": 0} and not found["sampled"]
    assert found["sources"][0]["epochs"] == 1.0


def test_a_mixture_is_counted_by_source_and_a_long_run_is_sampled_and_said_so() -> None:
    config = replace(Config(), data=DataConfig(seq_len=8))
    config = replace(config, train=replace(config.train, steps=100, global_batch=2))
    mixture = mixed([[8] * 10, [3] * 10], [3, 1])
    found = audit(config, mixture.corpus, Loader(mixture, 2), most_steps=10)
    assert found["sampled"] and found["sequences_looked_at"] == 20
    assert [one["epochs"] for one in found["sources"]] == pytest.approx([15.0, 50 * 8 / 30])
