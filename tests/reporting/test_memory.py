"""Bytes by category of one step: they add up, are what they are called, and measuring changes no number."""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longctx.config import Config
from longctx.errors import ConfigError
from longctx.reporting.live_storages import LiveStorages
from longctx.reporting.memory import CATEGORIES, by_category, is_measured
from longctx.reporting.report.memory_bars import memory_section
from longctx.reporting.report.page import render
from tests.train.small_run import small_config, train_on_sim

LEVERS = {"recompute": "full", "mlp_chunk": 8, "offload": True}


def run_of(directory, **sections):
    config = small_config(directory, **{"logger": {"memory": None}, **sections})
    seen, cluster = train_on_sim(config)
    path = directory / "memory.json"
    return seen, cluster, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(("degrees", "levers"), [({}, LEVERS), ({"tp": 2}, {}), ({"sp": 2}, LEVERS)], ids=str)
def test_a_measured_step_adds_up_and_changes_nothing(tmp_path, degrees, levers):
    sections = {"parallel": degrees, "train": {"steps": 3, **levers}}
    seen, cluster, memory = run_of(tmp_path / "measured", **sections)
    without, other, nothing = run_of(tmp_path / "not", **sections, logger={"memory": False})
    assert seen == without and nothing is None
    assert memory["step"] == 2 and memory["device"] == "cpu"
    ranks = memory["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(2 if degrees else 1))
    for rank in ranks:
        assert sum(rank[name] for name in CATEGORIES) == rank["peak"]
        assert rank["optimizer"] > 2 * rank["parameters"] * 0.99 and rank["parameters"] > 0
        assert rank["host"] == rank["offloaded"] and (rank["host"] > 0) == bool(levers)
        assert rank["gathered"] > 0
    # One gathering of numbers in all; what attention and FSDP2 send stays what it is.
    assert cluster.ledger.by_operation().get("send") == other.ledger.by_operation().get("send")


def test_recompute_turns_activations_into_recomputed_ones(tmp_path):
    rows = {}
    for mode in ("none", "full"):
        *_, memory = run_of(tmp_path / mode, train={"steps": 2, "recompute": mode}, data={"seq_len": 501})
        rows[mode] = memory["ranks"][0]
    assert rows["none"]["recomputed"] == 0 < rows["full"]["recomputed"]
    assert rows["full"]["activations"] < rows["none"]["activations"] / 4
    assert rows["full"]["peak"] < rows["none"]["peak"]


def test_a_run_of_one_step_is_not_measured(tmp_path):
    assert run_of(tmp_path, train={"steps": 1})[2] is None


def test_peaks_resizes_and_deaths():
    weight = torch.zeros(100, requires_grad=True)
    gathered = torch.zeros(50)
    gathered.untyped_storage().resize_(0)
    with LiveStorages("cpu", {}) as storages:
        storages.tag(weight.detach(), "parameters")
        gathered.untyped_storage().resize_(200)
        gathered.copy_(weight.detach()[:50])
        kept = weight * 2
        temporary = torch.zeros(1000)
        del temporary
        gathered.untyped_storage().resize_(0)
        storages.keep()
        torch.zeros(1)
    found = by_category(storages)
    expected = {"parameters": 400, "gathered": 200, "activations": 400, "temporary": 4000, "peak": 5000}
    assert {name: size for name, size in found.items() if size} == expected
    assert kept.numel() == 100


def test_what_backward_makes_is_told_apart():
    x = torch.ones(1000, requires_grad=True)
    with LiveStorages("cpu", {}) as storages:
        storages.tag(x.detach(), "parameters")
        y = checkpoint(lambda x: x.sin().exp().sin().exp().sin(), x, use_reentrant=False)
        storages.keep()
        y.sum().backward()
    found = by_category(storages)
    assert found["recomputed"] == 8000 and found["activations"] == 4000 and found["parameters"] == 4000
    assert found["peak"] == sum(found[name] for name in CATEGORIES)


def test_compiled_runs_are_not_measured_and_say_so_when_asked():
    assert is_measured(Config())
    assert not is_measured(Config.from_dict({"train": {"compile": True}}))
    with pytest.raises(ConfigError, match=r"logger\.memory=true.*train\.compile"):
        Config.from_dict({"train": {"compile": True}, "logger": {"memory": True}})


def test_the_report_shows_the_fullest_rank(tmp_path):
    sizes = dict.fromkeys(CATEGORIES, 0)
    peaks = [{"activations": size, "peak": size, "host": 7} for size in (10, 20)]
    ranks = [{"rank": rank, **sizes, **peak} for rank, peak in enumerate(peaks)]
    (tmp_path / "memory.json").write_text(json.dumps({"step": 2, "device": "cpu", "ranks": ranks}))
    page = render(tmp_path)
    assert "rank 1, the fullest of 2" in page and CATEGORIES["activations"] in page
    assert CATEGORIES["gradients"] not in page


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 2, "ranks": []}', '{"step": 2, "ranks": [{"peak": "<b>"}]}'])
def test_a_file_that_no_run_has_written_is_left_out(text):
    assert memory_section(text) == ""
