"""The self-test of RoPE before the first step: silent where all is right, and 70 by layer, rank and position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config import Config, simulated_world_size
from longctx.config.sections.rope import RopeConfig
from longctx.errors import NumericsError
from longctx.launcher import build, cli
from longctx.mesh import build_mesh
from longctx.model import Decoder
from longctx.parallel import parallelize
from longctx.sequence import LocalBatch
from longctx.train.batch_sharder import BatchSharder
from longctx.train.canary.positions import check_positions
from tests.train.small_run import CPU, small_config

FACTORS = tuple(1.0 + 0.5 * number for number in range(4))
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 50.0},
    "none": {},
    "linear": {"factor": 3.0, "partial_rotary_factor": 0.5},
    "ntk": {"factor": 3.0},
    "dynamic": {"factor": 2.0, "max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0},
    "longrope": {
        "short_factor": FACTORS,
        "long_factor": FACTORS[::-1],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
MESHES: dict[str, dict[str, Any]] = {
    "zigzag": {"parallel": {"sp": 4}, "attention": {"layout": "zigzag"}},
    "striped": {"parallel": {"sp": 3}, "attention": {"strategy": "striped", "layout": "striped"}},
    "one document": {"parallel": {"sp": 2, "tp": 2}, "attention": {"document_mask": False}},
    "stages": {"parallel": {"pp": 2, "dp_shard": 2, "pp_schedule": "gpipe"}, "train": {"dtype": "bfloat16"}},
    "more ranks than tokens": {"parallel": {"sp": 4}, "data": {"seq_len": 3}},
}


def made(directory: Path, rope: str, mesh: str = "zigzag") -> Config:
    """A model whose layers with and without a window have other positions."""
    sections = MESHES[mesh]
    config = small_config(directory, **sections)
    section = RopeConfig(rope_type=rope, **ROPES[rope])
    model = replace(config.model, pattern="WS", window=5, rope=section, rope_window=RopeConfig(rope_type="default"))
    return replace(config, model=model.settled(config.data.seq_len))


def check(config: Config, built: Config | None = None) -> None:
    """Runs the self-test of ``config`` on a model that was built by ``built``, without any weights."""

    def rank() -> None:
        mesh = build_mesh(config.parallel, "cpu")
        with torch.device("meta"):
            decoder = Decoder((built or config).model)
        check_positions(config, parallelize(decoder, config, mesh), mesh, CPU)

    build.simulate(config, rank)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_type_passes_on_every_mesh(mesh: str, tmp_path: Path) -> None:
    for rope in ROPES if mesh == "zigzag" else ("yarn", "none"):
        check(made(tmp_path, rope, mesh))


def test_another_table_is_named_by_layer(tmp_path: Path) -> None:
    """Also one that differs in nothing but the length that it was made for."""
    config = made(tmp_path, "dynamic")
    other = replace(config.model, rope=replace(config.model.rope, length=17))
    with pytest.raises(NumericsError, match=r"layer 1 of rank 0 turns channel \d at position \d+ .*S: dynamic"):
        check(config, replace(config, model=other))
    other = replace(config.model, rope_window=RopeConfig())
    with pytest.raises(NumericsError, match=r"layer 0 of rank 0 .*W: default"):
        check(config, replace(config, model=other))


@pytest.mark.parametrize("mesh", ["zigzag", "striped", "stages"])
def test_positions_of_a_ranks_own_are_named_by_rank(mesh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cut = made(tmp_path, "default", mesh), BatchSharder.__call__

    def local(self: BatchSharder, *arguments: Any) -> LocalBatch:
        batch = cut(self, *arguments)
        return replace(batch, positions=batch.positions + (self.rank == self.size - 1))

    monkeypatch.setattr(BatchSharder, "__call__", local)
    rank = simulated_world_size(config) - 1 if mesh != "stages" else 0
    with pytest.raises(NumericsError, match=rf"of rank {rank} turns channel 0 at position .*distances"):
        check(config)


def test_a_run_stops_with_70(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = Decoder.rotations

    def halved(self: Decoder, positions: torch.Tensor, dtype: torch.dtype) -> Any:
        return turned(self, positions // 2, dtype)

    monkeypatch.setattr(Decoder, "rotations", halved)
    words = ["train", "comm=sim", "parallel.sp=2", "logger=none", "train.canary=false", "data.seq_len=32"]
    assert cli.main([*words, "train.steps=1", f"run.dir={tmp_path / 'run'}"]) == 70
    assert "layer 0 of rank 0 turns channel 0 at position 1 of its document" in capsys.readouterr().err
