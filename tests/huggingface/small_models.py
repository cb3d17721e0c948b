"""Tiny random models of each family as ``transformers`` makes and saves them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

import torch  # noqa: E402 - after the skip

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DEFAULT = {"rope_type": "default", "rope_theta": 500_000.0}
# A name for each case, the class of its configuration, and what its family can have that others lack.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 20, "rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 13}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 4}),
    "olmo3": (
        "Olmo3Config",
        {"sliding_window": 11, "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT}},
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {
            "head_dim": 16,
            "attention_bias": True,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "initializer_range": 0.06,
        },
    ),
    "olmo hybrid": (
        "OlmoHybridConfig",
        {
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "linear_conv_kernel_dim": 3,
            "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 11, "sliding_window_pattern": 2},
    ),
}


@cache
def published(name: str) -> Any:
    """The model of a case, with norms that are not all ones."""
    torch.manual_seed(sum(map(ord, name)))
    kind, own = CASES[name]
    config = getattr(transformers, kind)(**{**SIZES, **own})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved(name: str, directory: Path) -> Path:
    """Saves the model of a case in several files, and returns its directory."""
    path = directory / name.replace(" ", "-")
    published(name).save_pretrained(path, max_shard_size="60KB")
    return path
