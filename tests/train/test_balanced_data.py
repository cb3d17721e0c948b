"""``data.balance`` in a run: dealing rows changes no loss, and packed documents are the same for every mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.small_run import small_config, train_on_sim

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
