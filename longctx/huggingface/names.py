"""Maps names of our parameters to those of a model directory, one to one: no weight is split, joined or turned."""

from __future__ import annotations

import re

from longctx.config import ModelConfig

_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")

_ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "mlp_out": "mlp.down_proj",
}
# Where a branch is normed before and after, four norms need four names.
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
_ENDS = {"embedding": "embed_tokens", "norm": "norm"}


def published_name(name: str, config: ModelConfig, prefix: str = "model.") -> str:
    """Returns the name that a directory has for our parameter ``name``."""
    module, _, kind = name.rpartition(".")
    layer = _LAYER.fullmatch(module)
    if layer is not None:
        inside = {**_ATTENTION, **_NORMS[config.norm]}
        return f"{prefix}layers.{layer[1]}.{inside[layer[2]]}.{kind}"
    return f"lm_head.{kind}" if module == "head" else f"{prefix}{_ENDS[module]}.{kind}"
