"""``data.balance`` in a run: dealing rows changes no loss, packed documents are the same for every mesh, and what a run
tells of its balance is what the loader dealt out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.config import Config, simulated_world_size
from longctx.data import Balance, Corpus
from longctx.launcher.build import build_loader
from longctx.mesh import build_mesh
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from tests.train.small_run import CPU, ran, small_config, train_on_sim

RELATIVE = 1e-9


def trained(path: Path, balance: str, **sections: dict[str, Any]) -> list[tuple[float, float, float, float]]:
    train = {"steps": 6, "global_batch": 8, **sections.pop("train", {})}
    return train_on_sim(small_config(path, data={"balance": balance}, train=train, **sections))[0]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_dealing_rows_changes_the_order_of_summation_alone(tmp_path, micro_batch):
    plain = trained(tmp_path / "plain", "none")
    dealt = trained(tmp_path / "dealt", "rows", parallel={"dp_shard": 2}, train={"micro_batch": micro_batch})
    for one, other in zip(plain, dealt, strict=True):
        assert other[:3] == pytest.approx(one[:3], rel=RELATIVE, abs=0)


def test_packed_documents_are_the_same_for_every_mesh(tmp_path):
    alone = trained(tmp_path / "alone", "documents")
    shared = trained(tmp_path / "shared", "documents", parallel={"dp_shard": 2, "sp": 2})
    for one, other in zip(alone, shared, strict=True):
        assert other[:3] == pytest.approx(one[:3], rel=RELATIVE, abs=0)
    assert alone[0][0] != trained(tmp_path / "plain", "none")[0][0]


def skewed() -> Corpus:
    """A few documents longer than a row or nearly so, among many short ones."""
    generator = np.random.default_rng(3)
    lengths = generator.permutation([*generator.integers(30, 75, 12), *generator.integers(1, 7, 300)])
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(generator.integers(0, 200, bounds[-1]).astype(np.uint8), bounds, str, 256, "skewed")


def told(config: Config, source: Corpus) -> list[dict[str, Any]]:
    return ran(config, source, Meter(build_mesh(config.parallel, "cpu"), CPU))[1]


def balance_of_run(path: Path, balance: str, sp: int, steps: int) -> float:
    """Mean over the steps of a run of two data-parallel ranks, each of which told what its loader dealt out."""
    config = small_config(
        path,
        data={"balance": balance, "seq_len": 60},
        parallel={"dp_shard": 2, "sp": sp},
        train={"steps": steps, "global_batch": 8, "micro_batch": 2},
    )
    records = Cluster(simulated_world_size(config)).run(told, config, skewed())[0]
    loader = build_loader(config, skewed(), 0, 2)
    for step, record in enumerate(records):
        rows = [[loader.packing.lengths(step * 8 + row) for row in held.ravel()] for held in loader.rows(step * 8)]
        works = [sum(int(Balance().cells(row).sum()) for row in held) for held in rows]
        ranks = record["work_by_rank"]
        assert np.array(ranks).reshape(2, sp).sum(1).tolist() == works
        assert record["balance"] == pytest.approx(max(ranks) * len(ranks) / sum(ranks), rel=1e-15)
        assert record["straggler_tokens"] == max(row.max() for row in rows[ranks.index(max(ranks)) // sp])
        assert record["padding"] == 0
    return float(np.mean([record["balance"] for record in records]))


def test_a_run_tells_the_work_that_the_loader_deals_out_and_evens_it_out(tmp_path):
    plain, rows, documents = (
        balance_of_run(tmp_path / balance, balance, 1, 3) for balance in ("none", "rows", "documents")
    )
    assert rows - 1 < (plain - 1) / 2
    assert documents < plain


def test_ranks_of_a_sequence_tell_their_shares_of_what_the_loader_dealt_out(tmp_path):
    assert balance_of_run(tmp_path, "documents", 2, 1) >= 1
