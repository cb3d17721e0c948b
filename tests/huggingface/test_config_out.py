"""What is written of positions and sizes is what is trained; changed ones come out, and readers guess nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longctx.config import Config, ModelConfig
from longctx.errors import ConfigError
from longctx.huggingface.config_in import fields_of
from longctx.huggingface.writing.config_out import config_of, model_of
from longctx.launcher.compose import compose
from longctx.launcher.model_directory import with_directory_model
from tests.huggingface.small_models import CASES, saved
from tests.huggingface.tables import ours, same, theirs

LENGTHS = (50, 300)
LONG = {"short_factor": (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), "long_factor": tuple(range(1, 9))}
# What a user sets of model.rope, and max_position_embeddings and its original that follow for a model of 256.
CHANGED: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "abf": ({"rope_theta": 8e6}, (512, 256)),
    "ntk": ({"rope_type": "ntk", "factor": 4.0}, (1024, 256)),
    "linear": ({"rope_type": "linear", "factor": 4.0}, (1024, 256)),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0, "max_position_embeddings": 128}, (128, 128)),
    "yarn": ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}, (2048, 256)),
    "yarn, all": (
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "beta_fast": 20.0,
            "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False, "rope_theta": 5e5,
        },
        (400, 100),
    ),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        (512, 64),
    ),
    "longrope": ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, **LONG}, (256, 64)),
    "longrope, by length": (
        {
            "rope_type": "longrope", "original_max_position_embeddings": 64, "max_position_embeddings": 1000,
            "attention_factor": 1.3, **LONG,
        },
        (1000, 64),
    ),
}  # fmt: skip


def begun(directory: Path, **rope: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a directory with what a user sets of its positions, and the directory's configuration."""
    section = {**Config().to_dict()["model"], "name": "hf", "path": str(directory)}
    section["rope"] = {**section["rope"], **rope}
    filled = with_directory_model(section, [f"model.rope.{key}" for key in rope])
    model = Config.from_dict({"model": filled, "data": {"source": "tokens", "path": "none"}}).model
    return model, json.loads((directory / "config.json").read_text())


def put(directory: Path, keys: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(keys))
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: saved(name, folder) for name in ("qwen3", "olmo3", "gemma3", "llama")}


@pytest.mark.parametrize("name", CHANGED)
def test_positions_that_a_user_changed_come_out(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    rope, lengths = CHANGED[name]
    model, before = begun(directories["qwen3"], **rope)
    keys = config_of(model, 512, before, "float32").keys
    assert (keys["max_position_embeddings"], keys["original_max_position_embeddings"]) == lengths
    inside = keys["rope_parameters"]
    assert keys["rope_theta"] == inside["rope_theta"]
    assert keys["rope_scaling"] == (None if inside["rope_type"] == "default" else inside)
    assert not {"max_position_embeddings", "length"} & set(inside)
    for length in LENGTHS:
        found = theirs(put(tmp_path / "out", keys), length, model.kinds)
        assert same(found, ours(model, length))
    assert not same(found, ours(begun(directories["qwen3"])[0], length)), "the change shows"
    again = config_of(model_of(keys, "again"), 512, keys, "float32").keys
    assert again == keys, "a directory of ours goes in and out unchanged"


@pytest.mark.parametrize("name", ["olmo3", "gemma3"])
def test_positions_by_layer_type_come_out(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    model, before = begun(directories[name], rope_type="yarn", factor=16.0, original_max_position_embeddings=64)
    found = config_of(model, 512, before, "float32")
    assert not found.notes or "max_position_embeddings=1024 (was 256)" in found.notes
    full = found.keys["rope_parameters"]["full_attention"]
    assert found.keys["max_position_embeddings"] == 1024 and found.keys["rope_scaling"] == full
    assert same(theirs(put(tmp_path / "out", found.keys), 300, model.kinds), ours(model, 300))
    # A base of their own is what transformers 4 cannot say of OLMo 3, and says of Gemma 3 under another name.
    other = replace(model, rope_window=replace(model.rope_window, rope_theta=77.0))
    found = config_of(other, 512, before, "float32")
    assert any("rope_theta=77.0" in note for note in found.notes) == (name == "olmo3")
    assert found.keys.get("rope_local_base_freq") == (77.0 if name == "gemma3" else None)
    assert same(theirs(put(tmp_path / "other", found.keys), 300, model.kinds), ours(other, 300))


def test_what_transformers_reads_past_by_layer_type_is_no_export(directories: dict[str, Path]) -> None:
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "truncate": False}
    model, before = begun(directories["olmo3"], **rope)
    with pytest.raises(ConfigError, match="truncate=False"):
        config_of(model, 512, before, "float32")


def test_an_original_length_is_never_left_to_guesses(directories: dict[str, Path], tmp_path: Path) -> None:
    """A file that lacks it is refused, for readers take the raised maximum; ours has it inside and outside."""
    _, before = begun(directories["llama"])
    partial = {**before, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 1024}
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        model_of(partial, "partial")
    stale = {**before, "rope_parameters": {**partial["rope_parameters"], "original_max_position_embeddings": 64}}
    found = config_of(model_of(stale, "stale"), 512, stale, "float32")
    assert found.keys["max_position_embeddings"] == 256
    raised = {**stale, "max_position_embeddings": 9999}
    found = config_of(model_of(raised, "raised"), 512, raised, "float32")
    assert found.keys["max_position_embeddings"] == 256 and "max_position_embeddings=256 (was 9999)" in found.notes


OWN = {
    "llama": ["model=small"],
    "llama biased": ["model.attention_bias=all", "model.mlp_bias=true", "model.norm_eps=1e-3"],
    "qwen2": ["model.attention_bias=qkv"],
    "qwen3": ["model.qk_norm=true"],
    "mistral": ["model.pattern=W", "model.window=16"],
    "qwen2 windows": ["model.attention_bias=qkv", "model.pattern=SSW", "model.window=16"],
    "olmo2": ["model.norm=post", "model.qk_norm=true", "model.qk_norm_dim=width"],
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ones_own_is_the_family_that_computes_it(name: str, tmp_path: Path) -> None:
    model = compose(OWN[name]).model
    found = config_of(model, 1024, None, "float32")
    assert found.keys["model_type"] == found.family.model_type == name.partition(" ")[0]
    assert same(theirs(put(tmp_path / "own", found.keys), 40, model.kinds), ours(model, 40))
    assert found.keys["eos_token_id"] is None, "the class has one of another vocabulary"


NONE = {
    "windows": (["model.pattern=WS", "model.window=16"], "pattern=WWWW for WSWS"),
    "gate": (["model.output_gate=true"], "output_gate=False for True"),
    "partial": (["model.rope.partial_rotary_factor=0.5"], "partial_rotary_factor=0.5"),
    "scale": (["model.logit_scale=0.5"], "logit_scale=1.0 for 0.5"),
    "no positions": (["model.rope.rope_type=none"], "rope_type='none'"),
    "mixer": (["model.pattern=SL", "model.mixer=retnet"], "no family of Hugging Face"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_no_family_computes_is_refused_by_name(name: str) -> None:
    words, told = NONE[name]
    with pytest.raises(ConfigError, match=told):
        config_of(compose(words).model, 1024, None, "float32")


def test_every_family_comes_out_as_it_went_in(tmp_path: Path) -> None:
    for name in CASES:
        before = json.loads((saved(name, tmp_path) / "config.json").read_text())
        keys = config_of(model_of(before, name), 256, before, "float32").keys
        assert {key: keys[key] for key in before if key not in ("rope_parameters", "dtype")} == {
            key: value for key, value in before.items() if key not in ("rope_parameters", "dtype")
        }
        assert fields_of(keys, name)[1] == fields_of(before, name)[1]
