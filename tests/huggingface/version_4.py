"""Run by an interpreter that has transformers 4.57, which `make matrix` sets up beside the one of 5.

``record FILE`` writes configurations as that version writes them; ``logits FOLDER`` those of each directory in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None, "dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ODD_YARN = {**YARN, "beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}
LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "attention_bias": True}),
    "llama yarn": ("Llama", {"rope_scaling": ODD_YARN, "tie_word_embeddings": True, "head_dim": 20}),
    "llama linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "mlp_bias": True}),
    "llama dynamic": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "llama longrope": ("Llama", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    "mistral": ("Mistral", {"sliding_window": 13}),
    "mistral full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen2 full": ("Qwen2", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_scaling": YARN, "rope_theta": 1e6}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "olmo3": ("Olmo3", {"sliding_window": 11, "rope_scaling": YARN, "rope_theta": 500000.0}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 11, "rope_local_base_freq": 5000.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}  # fmt: skip


def record(file: Path) -> None:
    """Writes the configuration of each model as this version does."""
    written = {}
    for name, (kind, own) in MODELS.items():
        config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**{**SIZES, **own})
        config.architectures = [f"{kind}ForCausalLM"]
        written[name] = json.loads(config.to_json_string())
    file.write_text(json.dumps(written, indent=1) + "\n")


def logits(folder: Path) -> None:
    """Computes the logits of each directory in ``folder`` of the tokens that lie there."""
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    for directory in sorted(path.parent for path in folder.glob("*/config.json")):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        with torch.no_grad():
            save_file({"logits": model(tokens).logits}, folder / f"{directory.name}.safetensors")


if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    {"record": record, "logits": logits}[sys.argv[1]](Path(sys.argv[2]))
