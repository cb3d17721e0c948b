"""A run that commit 6a68e08 wrote, under keys and values that have other names now, goes on."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from longctx.launcher.cli import main
from longctx.launcher.compose import compose
from longctx.launcher.run_directory import read_config
from longctx.reporting.report.page import write_report

RECORDED = Path(__file__).parent / "run_of_6a68e08"
# What it was made with, in today's names.
OVERRIDES = [
    "comm=sim", "parallel.sp=2", "parallel.dp_shard=1", "attention=burst", "attention.inner_ring=1",
    "attention.backward_rotates=q", "attention.grad_dtype=compute", "train.recompute=full",
    "train.recompute_keep=[attention_half]", "data=text", "data.path=text", "data.seq_len=64", "model.dim=8",
    "model.heads=2", "model.kv_heads=1", "model.head_dim=4", "model.hidden_dim=8", "model.layers=2", "train.steps=6",
    "checkpoint.every=3", "checkpoint.keep=0", "logger.progress=false", "logger.wandb=disabled",
    "logger.report=false", "optim.warmup_steps=20", "optim.decay_steps=6",
]  # fmt: skip
# Its six steps were all warm-up, which a new run may not be; a longer schedule has the same six.
FRESH = [*OVERRIDES, "optim.decay_steps=40"]
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "comm_bytes", "work_by_rank", "bytes_by_rank")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the run was started in: its data, and the run with its first three steps."""
    shutil.copytree(RECORDED / "corpus", tmp_path / "text")
    shutil.copytree(RECORDED, tmp_path / "run", ignore=shutil.ignore_patterns("corpus"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: record[key] for key in EXACT} for record in map(json.loads, lines)]


def test_it_goes_on_as_it_did_and_as_a_fresh_run(folder, caplog):
    assert main(["train", *FRESH, "run.dir=fresh"]) == 0
    with caplog.at_level(logging.WARNING):
        assert main(["train", *OVERRIDES, "run.dir=run", "--resume"]) == 0
    assert "another configuration" not in caplog.text
    recorded, fresh, resumed = (steps(run) for run in (RECORDED, Path("fresh"), Path("run")))
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]
    assert resumed[:3] == recorded[:3]
    if fresh[:3] == recorded[:3]:  # this machine has the arithmetic of the one that wrote the run
        assert resumed == fresh
        # Since then tiles of attention end where documents do, which adds gradients up in another order.
        for one, other in zip(resumed, recorded, strict=True):
            assert {**one, "grad_norm": 0} == {**other, "grad_norm": 0}
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-7)
        return
    for one, other in zip(resumed[3:], fresh[3:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_a_changed_key_is_still_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--resume=run", "attention.grad_dtype=fp32"]) == 0
    (told,) = [r.getMessage() for r in caplog.records if "another configuration" in r.getMessage()]
    assert told.endswith("from here on: attention.grad_dtype=fp32 (was compute)")


def test_its_files_are_read_in_todays_names(folder):
    read = read_config(folder / "run" / "config.yaml")
    assert read == compose([*OVERRIDES, "run.dir=run"])
    attention = read.attention
    assert (attention.inner_ring, attention.backward_rotates, attention.grad_dtype) == (1, "q", "compute")
    assert read.train.recompute_keep == ("attention_half",)
    assert "burst" in write_report(folder / "run").read_text()
