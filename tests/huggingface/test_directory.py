"""A directory as Hugging Face users have it goes in: its model is that of ``transformers``, on any mesh."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longctx.config import Config, simulated_world_size
from longctx.data import write_tokens
from longctx.errors import ConfigError, DataError
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.names import published_tensors
from longctx.huggingface.weights import read_header
from longctx.launcher import build
from longctx.launcher.cli import main
from longctx.launcher.model_directory import with_directory_model
from longctx.mesh import build_mesh
from longctx.parallel.data import full_tensor
from longctx.parallel.pipeline import Pipeline
from longctx.sequence import IGNORE, Batch, Documents
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from tests.huggingface.small_models import CASES, SIZES, published, saved
from tests.train.small_run import CPU, small_config

LENGTHS = (37, 1, 26)
SEQ = sum(LENGTHS)
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "ring": {"parallel": {"sp": 2, "tp": 2}},
    "tensors of shared heads": {"parallel": {"tp": 4}},
    "stages": {"parallel": {"pp": 2, "sp": 2, "pp_schedule": "gpipe"}, "attention": {"strategy": "gather"}},
}


def tokens() -> Tensor:
    return torch.randint(SIZES["vocab_size"], (1, SEQ), generator=torch.Generator().manual_seed(3))


def labelled(whole: Tensor) -> Tensor:
    labels = torch.full_like(whole, IGNORE)
    start = 0
    for length in LENGTHS:
        labels[:, start : start + length - 1] = whole[:, start + 1 : start + length]
        start += length
    return labels


def reference(name: str) -> tuple[float, dict[str, Tensor]]:
    """Loss over all labels and gradients of ``transformers``' own model, each document by itself."""
    model, whole, start = published(name), tokens(), 0
    model.zero_grad()
    total, count = torch.zeros(()), SEQ - len(LENGTHS)
    for length in LENGTHS:
        part = whole[:, start : start + length]
        logits = model(part).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum") / count
        start += length
    total.backward()
    return total.item(), {key: p.grad.clone() for key, p in model.named_parameters()}


def run(config: Config) -> tuple[float, dict[str, Tensor]]:
    """One rank's loss over all labels, and gradients by our names, of the directory's model."""
    mesh = build_mesh(config.parallel, "cpu")
    meter = build.meter_of(config, mesh, CPU, lambda: None)
    model = build.build_model(config, mesh, CPU)
    optimizer = build.build_optimizer(model, config.optim)
    step = build.TrainStep(build.engine_of(model, optimizer, config, mesh), mesh, CPU)
    whole = tokens()
    sharder = BatchSharder.of(config, mesh, CPU)
    local = sharder(Batch(whole, labelled(whole), (Documents.from_lengths(LENGTHS),)))
    result = step.gradients([local])
    own = model.own_parameters() if isinstance(model, Pipeline) else model.named_parameters()
    assert result.loss is not None and meter is not None
    return result.loss, {key: full_tensor(p.grad) for key, p in own if p.grad is not None}


def sampled() -> list[Any]:
    """All cases on all meshes; `make test` takes each family on one and each mesh with three families."""
    often = {"ring", "one"}
    return [
        pytest.param(name, mesh, marks=() if mesh in often or name in ("olmo3", "gemma3") else pytest.mark.matrix)
        for name in CASES
        for mesh in MESHES
    ]


@pytest.mark.parametrize(("name", "mesh"), sampled())
def test_it_is_the_model_of_transformers_on_any_mesh(name: str, mesh: str, tmp_path: Path) -> None:
    directory = saved(name, tmp_path)
    family, fields, _ = model_fields(directory)
    section = with_directory_model({**Config().to_dict()["model"], "name": "hf", "path": str(directory)}, [])
    model = Config.from_dict({"model": section, "data": {"source": "tokens", "path": "none"}}).model
    assert model.pattern == fields["pattern"] if "pattern" in fields else model.pattern == "S"
    config = small_config(
        tmp_path, **{**MESHES[mesh], "train": {"dtype": "float32", "global_batch": 1}, "data": {"seq_len": SEQ}}
    )
    config = replace(config, model=model.settled(SEQ))
    loss, gradients = reference(name)
    found: dict[str, Tensor] = {}
    for own_loss, own in Cluster(simulated_world_size(config)).run(build.run_with_nodes, config, run, config):
        assert own_loss == pytest.approx(loss, rel=2e-6)
        found |= own
    joined = published_tensors(found, model, family.names)
    assert set(joined) == set(gradients)
    # Of a decay of linear layers transformers itself loses a few more digits than others.
    least = 1e-2 * max(torch.linalg.vector_norm(gradient) for gradient in gradients.values())
    for key, gradient in joined.items():
        expected = gradients[key]
        scale = torch.linalg.vector_norm(expected) + (least if "linear_attn" in key else 0.0)
        assert torch.linalg.vector_norm(gradient - expected) < 1e-5 * scale + 1e-7, key


def test_what_the_user_sets_wins_and_another_type_keeps_what_it_reads(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path)
    section = {**Config().to_dict()["model"], "name": "hf", "path": str(directory)}
    section["rope"] |= {"rope_type": "yarn", "factor": 2.0}
    filled = with_directory_model(section, ["model.rope.rope_type", "model.rope.factor", "data.path"])
    assert filled["rope"] == {**section["rope"], "original_max_position_embeddings": 64}
    assert filled["dim"] == SIZES["hidden_size"] and filled["attention_bias"] == "all"
    with pytest.raises(ConfigError, match="model=hf"):
        with_directory_model({**section, "name": "tiny"}, [])


BAD = {
    "another family": ({"model_type": "mamba"}, "model_type='mamba'"),
    "experts": ({"num_experts": 8}, "mixture of experts"),
    "unknown": ({"logit_bias_of_the_moon": 1.5}, "logit_bias_of_the_moon=1.5"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "partial": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
    "contradictory": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "keep one of them"),
    "no size": ({"hidden_size": None}, "lacks hidden_size"),
    "activation": ({"hidden_act": "relu"}, "hidden_act='relu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_computed_exactly_is_refused_by_name(case: str, tmp_path: Path) -> None:
    directory = saved("llama", tmp_path)
    path, (change, words) = directory / "config.json", BAD[case]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    section = {**Config().to_dict()["model"], "name": "hf", "path": str(directory)}
    with pytest.raises(ConfigError, match=words):
        Config.from_dict({"model": with_directory_model(section, [])})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_a_typed_error_that_names_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "header"
    if not folder.exists():
        saved("qwen3", folder)
    whole = next(iter(sorted((folder / "qwen3").glob("*.safetensors")))).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    if kind == "flip":
        place = data.draw(st.integers(0, header - 1))
        damaged = whole[:place] + bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[place + 1 :]
    else:
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))] if kind == "cut" else whole + b"x"
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged)
    found: dict[str, Any] = {}
    try:
        found = read_header(path)
    except DataError as error:
        assert "damaged.safetensors" in str(error)  # noqa: PT017 - others may read a name or an equal size
    assert not found or kind == "flip", "only names, and shapes of equal size, change unseen in a header"


def test_a_run_goes_on_without_the_directory_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = saved("qwen3", tmp_path)
    words = ["train", "comm=sim", "parallel.sp=2", "logger=none", "train.canary=false", "run.dir=run"]
    own = ["model=hf", f"model.path={directory}", "data=tokens", "data.path=corpus.bin", "data.seq_len=32"]
    write_tokens(tmp_path / "corpus.bin", [list(range(n, n + 40)) for n in range(40)])
    assert main([*words, *own, "train.steps=2", "model.rope.partial_rotary_factor=0.5"]) == 0
    shutil.rmtree(directory)
    assert main([*words, "--resume", "train.steps=3"]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        model_fields(directory)
