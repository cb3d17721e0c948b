"""What is peculiar to hybrids: weights that join and split, a model inside a larger one's file, NoPE, and refusals."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from longctx.checkpoint.shards import read_shards
from longctx.config import Config
from longctx.config.parsing import parse
from longctx.config.sections import ModelConfig
from longctx.errors import ConfigError, DataError
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.joining import joined, published_tensors
from longctx.huggingface.load import load_directory
from longctx.huggingface.pieces import cut_out
from longctx.huggingface.weights import locate_weights
from longctx.launcher.model_directory import with_directory_model
from longctx.model import Decoder
from tests.huggingface.small_models import published, saved, transformers


def model_of(directory: Path) -> ModelConfig:
    section = with_directory_model({**Config().to_dict()["model"], "name": "hf", "path": str(directory)}, [])
    model = parse(ModelConfig, section, "model.")
    model.check()
    return model


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """Our parameters, as they are read."""
    model = Decoder(model_of(directory))
    load_directory(model, model.config)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def rewrite(directory: Path, change: Any) -> None:
    """Writes the weights anew, in one file."""
    files = sorted(directory.glob("*.safetensors"))
    weights = change({name: tensor for file in files for name, tensor in load_file(file).items()})
    for file in [*files, *directory.glob("*.index.json")]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")


def as_the_class_has_them(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the class of ``transformers``: one filter, and norms by their usual names."""
    renamed = {}
    for name, tensor in weights.items():
        if "q_conv1d" in name:
            parts = [weights[name.replace("q_conv1d", f"{part}_conv1d")] for part in "qkv"]
            renamed[name.replace("q_conv1d", "conv1d")] = torch.cat(parts)
        elif "conv1d" not in name:
            name = name.replace("attention_layer_norm", "input_layernorm")
            renamed[name.replace("feedforward_layer_norm", "post_attention_layernorm")] = tensor
    return renamed


def as_published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Filters cut between queries, keys and values, where transformers saves thirds."""
    for name in [name for name in weights if "q_conv1d" in name]:
        names = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
        whole = torch.cat([weights[one] for one in names])
        assert [len(weights[one]) for one in names] != [32, 32, 48]
        weights |= dict(zip(names, whole.split([32, 32, 48]), strict=True))
    return weights


def test_weights_are_read_however_files_spell_and_cut_them(tmp_path: Path) -> None:
    directory = saved("olmo hybrid", tmp_path)
    found, expected = loaded(directory), dict(published("olmo hybrid").named_parameters())
    family, _, _ = model_fields(directory)
    for name, tensor in published_tensors(found, model_of(directory), family.names).items():
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected
    for change in (as_published, as_the_class_has_them):
        rewrite(directory, change)
        again = loaded(directory)
        assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    rewrite(directory, lambda weights: weights | {"model.layers.0.attention_layer_norm.weight": torch.ones(48)})
    with pytest.raises(DataError, match="which are the same weight"):
        loaded(directory)
    rewrite(directory, lambda weights: {n: t for n, t in weights.items() if "attention_layer_norm" not in n})
    conv = "model.layers.0.linear_attn.conv1d.weight"
    rewrite(directory, lambda weights: weights | {conv: weights[conv][1:]})
    with pytest.raises(ConfigError, match=r"conv1d.weight is \[111, 1, 3\] F32, config.json makes it \[112, 1, 3\]"):
        loaded(directory)


def test_a_text_model_is_read_from_inside_a_larger_one(tmp_path: Path) -> None:
    directory = saved("qwen3.5", tmp_path)
    alone, model = loaded(directory), model_of(directory)
    config = json.loads((directory / "config.json").read_text())
    larger = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": config | {"mtp_num_hidden_layers": 1, "full_attention_interval": 4, "attn_output_gate": True},
        "vision_config": {"depth": 1},
        "image_token_id": 7,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(larger))
    others = {"mtp.fc.weight": torch.ones(2), "model.visual.pos_embed.weight": torch.ones(3)}
    rewrite(
        directory,
        lambda weights: others | {n.replace("model.", "model.language_model.", 1): t for n, t in weights.items()},
    )
    again = loaded(directory)
    assert all(torch.equal(tensor, again[name]) for name, tensor in alone.items())
    assert model_of(directory) == model
    for change, words in (
        ({"tie_word_embeddings": True}, "make them one"),
        ({"text_config": None}, "holds its text model in text_config"),
        ({"text_config": config | {"num_experts": 8}}, "mixture of experts"),
    ):
        (directory / "config.json").write_text(json.dumps(larger | change))
        with pytest.raises(ConfigError, match=words):
            model_fields(directory)


@pytest.mark.parametrize(
    ("change", "kind", "theta"),
    [
        ({"rope_parameters": {"rope_theta": None}}, "none", 1e4),
        ({"rope_parameters": None, "rope_theta": None}, "none", 1e4),
        ({"rope_parameters": None}, "default", 1e4),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": None}, "default", 5e5),
    ],
)
def test_positions_are_there_or_not_as_transformers_has_it(
    change: dict[str, Any], kind: str, theta: float, tmp_path: Path
) -> None:
    directory = saved("olmo hybrid", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    model, reference = model_of(directory), transformers.AutoConfig.from_pretrained(directory)
    assert model.rope.type == kind
    assert reference.rope_parameters["rope_theta"] == (None if kind == "none" else theta == model.rope_theta and theta)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen3.5", {"hidden_act": "gelu"}, "apply silu"),
        ("qwen3.5", {"attn_output_gate": False}, "attn_output_gate=False"),
        ("qwen3.5", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16'"),
        ("qwen3.5", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen3.5", {"linear_num_key_heads": 3}, "linear.key_heads=3"),
        ("qwen3.5", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0"),
        ("qwen3.5", {"linear_use_moon": True}, "linear_use_moon"),
        ("olmo hybrid", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "all channels turn"),
        ("olmo hybrid", {"layer_types": ["linear_attention"] * 3}, "3 entries"),
        *((
            ("qwen3.5", {"model_type": kind}, f"model_type='{kind}'.*{why}")
            for kind, why in (
                ("qwen3_next", "mixture of experts"),
                ("qwen3_5_moe", "mixture of experts"),
                ("kimi_linear", "mixture of experts and multi-head latent attention"),
                ("deepseek_v3", "multi-head latent attention"),
                ("nemotron_h", "layers of Mamba"),
            )
        )),
    ],
)  # fmt: skip
def test_what_a_hybrid_has_otherwise_is_refused_by_name(
    name: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    directory = saved(name, tmp_path)
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        model_of(directory)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_joined_tensor_reads_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.just(3)), min_size=1, max_size=3))
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)]
    whole = joined([part.flatten(0, 1) for part in parts])
    cuts = sorted([*data.draw(st.lists(st.integers(1, len(whole)), max_size=3, unique=True)), 0, len(whole)])
    folder = tmp_path_factory.getbasetemp() / "cuts"
    folder.mkdir(exist_ok=True)
    pieces = {str(n): whole[start:stop].clone() for n, (start, stop) in enumerate(pairwise(cuts))}
    save_file({name: piece for name, piece in pieces.items() if len(piece)}, folder / "model.safetensors")
    located = locate_weights(folder)
    ordered, first = [located[name] for name in sorted(located)], 0
    for number, part in enumerate(parts):
        found = torch.full(part.shape, torch.nan)
        name = f"part {number}"
        read_shards({name: found}, {name: cut_out(ordered, name, tuple(part.shape), first)})
        assert torch.equal(found, part)
        first += part.numel()
