"""Twenty fp64 steps from a directory are those of a bare loop over ``transformers``' model, whatever the mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longctx.config import Config, simulated_world_size
from longctx.data import Corpus
from longctx.huggingface.reference.step import Reference
from longctx.launcher import build
from longctx.launcher.model_directory import with_directory_model
from longctx.mesh import build_mesh
from longctx.reporting.meter import Meter
from longctx.sequence import IGNORE
from longctx.train.learning_rate import LearningRate
from tests.huggingface.small_models import CASES, SIZES, saved
from tests.train.small_run import CPU, LENGTHS, ran, small_config

MESHES: dict[str, dict[str, Any]] = {
    "tp 2 sp 2": {"parallel": {"tp": 2, "sp": 2}},
    "pp 2 dp 2": {"parallel": {"pp": 2, "dp_shard": 2, "pp_schedule": "gpipe"}},
    "sp 4": {"parallel": {"sp": 4}, "attention": {"strategy": "gather", "layout": "zigzag"}},
}


def corpus() -> Corpus:
    """Documents of ids that the small models have, which follow one another by a rule with a little noise."""
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    steps = np.random.default_rng(7).choice([1, 5], size=int(bounds[-1]), p=[0.9, 0.1])
    tokens = (np.cumsum(steps) % SIZES["vocab_size"]).astype(np.uint8)
    return Corpus(tokens, bounds, lambda i: f"document {i}", SIZES["vocab_size"], "twenty steps")


def configured(name: str, mesh: str, folder: Path) -> Config:
    path = saved(name, folder)
    section = with_directory_model({**Config().to_dict()["model"], "name": "hf", "path": str(path)}, [])
    model = Config.from_dict({"model": section, "data": {"source": "tokens", "path": "none"}}).model
    # A rate that one would go on with; with a larger one twenty steps make more of rounding than a mistake would.
    config = small_config(folder, **MESHES[mesh], optim={"lr": 1e-3})
    return replace(config, model=model.settled(config.data.seq_len))


def bare_loop(config: Config) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of the patched model, with torch's own AdamW and clipping."""
    reference = Reference(config.model, torch.float64, patched=True)
    model, optim = reference.model, config.optim
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    others = [one for one in model.parameters() if one.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    loader, rates = build.build_loader(config, corpus(), 0, 1), LearningRate(optim, config.train.steps)
    told = []
    for step in range(1, config.train.steps + 1):
        batches = next(loader)
        count = sum(batch.valid_tokens for batch in batches)
        loss = 0.0
        for batch in batches:
            for tokens, labels, documents in zip(batch.tokens, batch.labels, batch.documents, strict=True):
                lengths = documents.lengths.tolist()
                for own, wanted in zip(tokens.split(lengths), labels.split(lengths), strict=True):
                    with reference.computing():
                        logits = model(own[None], use_cache=False).logits[0]
                    share = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum") / count
                    share.backward()
                    loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rates.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        told.append((loss, norm.item()))
    return told


def train_rank(config: Config) -> list[tuple[float, float]]:
    _, records = ran(config, corpus(), Meter(build_mesh(config.parallel, "cpu"), CPU))
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) == ("olmo3", "tp 2 sp 2") else pytest.mark.matrix)
        for name in CASES
        for mesh in MESHES
    ],
)
def test_they_are_those_of_a_bare_loop(name: str, mesh: str, tmp_path: Path) -> None:
    config = configured(name, mesh, tmp_path)
    found = build.simulate(config, train_rank, config)
    assert len(found) == simulated_world_size(config)
    expected = bare_loop(config)
    assert len(expected) == 20 and expected[-1][0] < expected[0][0], "it learns"
    for own in found:
        for step, (ours, theirs) in enumerate(zip(own, expected, strict=True), start=1):
            assert ours == pytest.approx(theirs, rel=1e-9), f"step {step}"
