"""A directory as Hugging Face users have it is read as it is meant; what is damaged or not understood is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Config
from longctx.data import write_tokens
from longctx.errors import ConfigError, DataError
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.weights import INDEX, SINGLE, locate_weights, read_header
from longctx.launcher.cli import main
from longctx.launcher.model_directory import with_directory_model
from tests.huggingface.small_models import SIZES, published, saved


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


def test_a_single_file_is_read_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path)
    index = (directory / INDEX).read_text(encoding="utf-8")
    published("llama").save_pretrained(directory)
    (directory / INDEX).write_text(index, encoding="utf-8")
    found = locate_weights(directory)
    assert set(found) == set(json.loads(index)["weight_map"])
    assert {path.name for path, _ in found.values()} == {SINGLE}


@pytest.mark.parametrize("case", ["olmo3", "gemma3"])
def test_a_type_that_versions_read_differently_by_layer_is_refused(case: str, tmp_path: Path) -> None:
    directory = saved(case, tmp_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="write rope_type"):
        model_fields(directory)
