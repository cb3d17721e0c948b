"""The loss on held-out documents: that of the dense model, on any mesh, and training does not notice it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longctx.config import Config
from longctx.config.sections.data import ValidationConfig
from longctx.data.held_out import HeldOut, packing_of, split
from longctx.errors import ConfigError
from longctx.launcher import build
from longctx.model import Decoder, initialize
from longctx.sequence import IGNORE, Documents, Mask
from longctx.train.canary.reference import DenseAttention
from tests.train.small_run import LENGTHS, corpus, small_config

FRACTION = 0.2
HELD = {"seq_len": 61, "validation": ValidationConfig(fraction=FRACTION, every=2, sequences=None)}
STEPS = 3
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "shards": {"parallel": {"dp_shard": 2}},
    "sequence": {"parallel": {"sp": 2, "tp": 2}},
    "stages": {"parallel": {"pp": 2}},
    "served": {
        "parallel": {"pp": 2, "pp_schedule": "gpipe"},
        "attention": {"strategy": "disaggregated", "layout": None, "server_pool": "pipeline"},
    },
}


def trained(directory: Path, name: str, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a small run on a simulated mesh; what it recorded of each step."""
    mesh = {key: dict(value) for key, value in MESHES[name].items()}
    config = small_config(directory, train={"steps": STEPS}, **{**mesh, **sections})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "open_corpus", lambda *args, **kwargs: corpus())
        build.run_sim(config, resume=None)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def dense_loss(config: Config) -> float:
    """Loss per label of the run's initial weights on the held-out documents, each piece of a row by itself."""
    model, source = Decoder(config.model).double(), corpus()
    initialize(model, config.train.seed)
    packing = packing_of(source, split(source, FRACTION)[1], config.data.seq_len, document_mask=True)
    rows = HeldOut(packing, global_batch=1)
    loss, count = 0.0, 0
    for row in range(rows.steps):
        (batch,) = rows.batches(row)
        bounds = np.cumsum([0, *batch.documents[0].lengths]).tolist()
        for start, stop in pairwise(bounds):
            tokens, labels = batch.tokens[:, start:stop], batch.labels[:, start:stop]
            model.set_attention(DenseAttention(Documents.single(stop - start), Mask()))
            with torch.no_grad():
                loss += float(
                    model(tokens, torch.arange(stop - start)[None], torch.zeros((), dtype=torch.int64), labels)
                )
            count += int((labels != IGNORE).sum())
    return loss / count


@pytest.mark.parametrize("name", MESHES)
def test_it_is_the_dense_loss_on_any_mesh_and_training_does_not_notice(tmp_path: Path, name: str) -> None:
    # With a rate of nearly zero the weights stay those of the beginning.
    still = {"optim": {"lr": 1e-300, "warmup_steps": 0}}
    records = trained(tmp_path / "still", name, data=HELD, **still)
    assert [record["validation_loss"] is not None for record in records] == [False, True, True], "every second, last"
    reference = dense_loss(small_config(tmp_path / "reference"))
    assert records[-1]["validation_loss"] == pytest.approx(reference, rel=1e-12)
    # The same documents left out, and no pass over them: the same steps, bit for bit.
    often = {"seq_len": 61, "validation": ValidationConfig(fraction=FRACTION, every=1)}
    once = {"seq_len": 61, "validation": ValidationConfig(fraction=FRACTION, every=0)}
    save = {"checkpoint": {"every": 1}}
    steps = [
        [(r["loss"], r["grad_norm"]) for r in trained(tmp_path / word, name, data=held, **save)]
        for word, held in (("often", often), ("once", once))
    ]
    assert steps[0] == steps[1] and len(steps[0]) == STEPS
    assert len(split(corpus(), FRACTION)[1]) < len(LENGTHS) / 2


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"fraction": 1.0}, r"data\.validation\.fraction=1\.0"),
        ({"fraction": 0.1, "path": "held.jsonl"}, "set one of them"),
        ({"every": 5}, "none is asked for"),
        ({"path": "held.jsonl"}, "reads no path"),
    ],
)
def test_what_cannot_be_meant_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_dict({"data": {"validation": section}})
    with pytest.raises(ConfigError, match="is what the run trains on"):
        Config.from_dict({"data": {"source": "text", "path": "a", "validation": {"path": "a"}}})
