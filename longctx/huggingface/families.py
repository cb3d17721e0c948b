"""Declares the families of models that a directory may hold: what its ``config.json`` says, in our words.

A family is a function from the file's keys to fields of ``model``. Defaults are those of the classes of
``transformers`` 5, for files leave out what equals them.
"""

from __future__ import annotations

from typing import Any

from longctx.config import ModelConfig
from longctx.errors import ConfigError
from longctx.huggingface.family import (
    FULL,
    LEFT_OUT,
    SLIDING,
    Family,
    Fields,
    biases,
    common,
    head_dim_of,
    layer_types,
    olmo,
    pattern_of,
)
from longctx.huggingface.hybrids import OLMO_HYBRID, QWEN3_5
from longctx.huggingface.keys import Keys
from longctx.huggingface.rope_in import rope_fields


def _llama(keys: Keys) -> Fields:
    keys.expect("pretraining_tp", 1, "slices of another rounding are not computed")
    return {
        **common(keys),
        "head_dim": head_dim_of(keys),
        **biases(keys),
        "mlp_bias": keys.flag("mlp_bias", False),
        **rope_fields(keys, 10_000.0),
    }


def _mistral(keys: Keys) -> Fields:
    window = keys.optional("sliding_window", 4096)
    keys.expect("layer_types", None, "mistral has one window for all layers; its class ignores the list")
    return {
        **common(keys, kv_heads=8),
        "head_dim": head_dim_of(keys),
        **pattern_of([FULL if window is None else SLIDING] * keys.layers, window, keys),
        **rope_fields(keys, 10_000.0),
    }


def _one_window(model: ModelConfig) -> Fields:
    return {"layer_types": LEFT_OUT}


def _qwen_layers(keys: Keys) -> Fields:
    window = keys.optional("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    keys.take("sliding_window", None)
    first = keys.size("max_window_layers", 28, least=0)
    default = [SLIDING if window is not None and layer >= first else FULL for layer in range(keys.layers)]
    return pattern_of(layer_types(keys, default), window, keys)


def _qwen2(keys: Keys) -> Fields:
    return {
        **common(keys, kv_heads=32),
        "head_dim": head_dim_of(keys),
        "attention_bias": "qkv",
        **_qwen_layers(keys),
        **rope_fields(keys, 10_000.0),
    }


def _qwen3(keys: Keys) -> Fields:
    return {
        **common(keys, kv_heads=32),
        "head_dim": head_dim_of(keys, 128),
        "qk_norm": True,
        **biases(keys),
        **_qwen_layers(keys),
        **rope_fields(keys, 10_000.0),
    }


def _olmo2(keys: Keys) -> Fields:
    return {**olmo(keys, eps=1e-5), **rope_fields(keys, 10_000.0)}


def _olmo3(keys: Keys) -> Fields:
    default = [FULL if (layer + 1) % 4 == 0 else SLIDING for layer in range(keys.layers)]
    pattern = pattern_of(layer_types(keys, default), keys.optional("sliding_window", 4096), keys)
    # Scaling in the old form is of the full layers alone.
    return {**olmo(keys, eps=1e-5), **pattern, **rope_fields(keys, 500_000.0, sliding=500_000.0)}


def _gemma3(keys: Keys) -> Fields:
    every = keys.size("sliding_window_pattern", 6)
    default = [SLIDING if (layer + 1) % every else FULL for layer in range(keys.layers)]
    pattern = pattern_of(layer_types(keys, default), keys.optional("sliding_window", 4096), keys)
    keys.expect("use_bidirectional_attention", False, "decoders are causal")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.expect(name, None, "logits are not capped")
    return {
        **common(keys, act=("hidden_activation", "gelu_pytorch_tanh"), tied=True),
        "kv_heads": keys.size("num_key_value_heads", 4),
        "head_dim": head_dim_of(keys, 256),
        "norm": "both",
        "norm_plus_one": True,
        "qk_norm": True,
        "query_scale": keys.real("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": float(keys.size("hidden_size")) ** 0.5,
        **biases(keys),
        **pattern,
        **rope_fields(keys, 1_000_000.0, sliding=keys.real("rope_local_base_freq", 10_000.0)),
    }


def _gemma3_keys(model: ModelConfig) -> Fields:
    scalar = (model.query_scale or model.head_dim**-0.5) ** -2
    whole = round(scalar)
    return {"query_pre_attn_scalar": whole if float(whole) ** -0.5 == model.query_scale else scalar}


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _llama),
        Family("mistral", "MistralForCausalLM", _mistral, own=_one_window),
        Family("qwen2", "Qwen2ForCausalLM", _qwen2),
        Family("qwen3", "Qwen3ForCausalLM", _qwen3),
        Family("olmo2", "Olmo2ForCausalLM", _olmo2),
        Family("olmo3", "Olmo3ForCausalLM", _olmo3, by_layer=True),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _gemma3,
            own=_gemma3_keys,
            by_layer=True,
            window_theta="rope_local_base_freq",
        ),
        QWEN3_5,
        OLMO_HYBRID,
    )
}


# Of families that others name in their files, why they are not trained here.
_OTHERS = {
    "a mixture of experts": (
        "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text olmoe gpt_oss llama4 llama4_text glm4_moe "
        "minimax minimax_m2 granitemoe jamba deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 kimi_linear"
    ),
    "multi-head latent attention": "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 kimi_linear minicpm3 longcat_flash",
    "layers of Mamba": "mamba mamba2 falcon_mamba falcon_h1 nemotron_h bamba jamba zamba zamba2 granitemoehybrid",
}


def family_of(model_type: Any) -> Family:
    """Returns the family of that ``model_type``. Raises ``ConfigError`` for one that is not trained exactly here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reasons = [what for what, types in _OTHERS.items() if str(model_type) in types.split()]
        because = f", for it has {' and '.join(reasons)}" if reasons else ""
        raise ConfigError(
            f"model_type={model_type!r} is not one of the families that are computed exactly here{because}: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
