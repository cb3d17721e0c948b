"""Declares the families of models that a directory may hold: what its ``config.json`` says, in our words.

A family is a function from the file's keys to fields of ``model``. Defaults are those of the classes of
``transformers`` 5, for files leave out what equals them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longctx.config import ModelConfig
from longctx.errors import ConfigError
from longctx.huggingface.keys import Keys
from longctx.huggingface.rope_in import rope_fields

Fields = dict[str, Any]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_LETTERS = {_FULL: "S", _SLIDING: "W"}
LAYER_TYPES = {letter: name for name, letter in _LETTERS.items()}
LEFT_OUT = object()


def _nothing(model: ModelConfig) -> Fields:
    return {}


@dataclass(frozen=True)
class Family:
    """Declares a family: its ``model_type``, the class that holds it, and how its file is read and written.

    ``fields(keys)``: fields of ``model``. ``prefix``: before the names of its decoder's weights. A file is written with
    those keys of ``config_out.common_keys`` that ``fields`` reads. ``own(model)``: keys that it has beside them, or
    otherwise; ``LEFT_OUT`` where it lacks a common one. ``by_layer``: layers with a window have positions of their own,
    and ``window_theta`` is what transformers 4 calls their base.
    """

    model_type: str
    architecture: str
    fields: Callable[[Keys], Fields]
    prefix: str = "model."
    own: Callable[[ModelConfig], Fields] = _nothing
    by_layer: bool = False
    window_theta: str | None = None


def _common(keys: Keys, act: str = "hidden_act", eps: float = 1e-6, tied: bool = False) -> Fields:
    heads = keys.size("num_attention_heads")
    name = keys.take(act, "silu")
    if name not in ACTIVATIONS:
        keys.refuse(act, name, f"the MLP is gated by {', '.join(ACTIVATIONS)}")
    keys.expect("attention_dropout", 0.0, "training here has no dropout; set it to 0")
    return {
        "vocab_size": keys.size("vocab_size"),
        "dim": keys.size("hidden_size"),
        "layers": keys.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.optional("num_key_value_heads") or heads,
        "hidden_dim": keys.size("intermediate_size"),
        "activation": ACTIVATIONS[name],
        "norm_eps": float(keys.take("rms_norm_eps", eps)),
        "init_std": float(keys.take("initializer_range", 0.02)),
        "tie_embeddings": bool(keys.take("tie_word_embeddings", tied)),
    }


def _head_dim(keys: Keys, default: int | None = None) -> int:
    return keys.optional("head_dim") or default or keys.size("hidden_size") // keys.size("num_attention_heads")


def _pattern(types: list[str], window: int | None, keys: Keys) -> Fields:
    """Returns the letters of a list of layer types, the shortest repeated part of it, and the window."""
    unknown = sorted(set(types) - set(_LETTERS))
    if unknown:
        keys.refuse("layer_types", unknown, f"layers are {', '.join(_LETTERS)}")
    if len(types) != keys.size("num_hidden_layers"):
        keys.refuse("layer_types", f"{len(types)} entries", f"num_hidden_layers={keys.size('num_hidden_layers')}")
    if _SLIDING in types and window is None:
        keys.refuse("sliding_window", None, "layer_types has sliding layers")
    letters = "".join(_LETTERS[one] for one in types)
    shortest = next(
        letters[:n] for n in range(1, len(letters) + 1) if (letters[:n] * len(letters))[: len(letters)] == letters
    )
    return {"pattern": shortest, "window": window if "W" in letters else None}


def _layer_types(keys: Keys, default: list[str]) -> list[str]:
    given = keys.take("layer_types", None)
    return default if given is None else list(given)


def _llama(keys: Keys) -> Fields:
    keys.expect("pretraining_tp", 1, "slices of another rounding are not computed")
    return {
        **_common(keys),
        "head_dim": _head_dim(keys),
        "attention_bias": "all" if keys.take("attention_bias", False) else "none",
        "mlp_bias": bool(keys.take("mlp_bias", False)),
        **rope_fields(keys, 10_000.0),
    }


def _mistral(keys: Keys) -> Fields:
    window = keys.optional("sliding_window", 4096)
    keys.expect("layer_types", None, "mistral has one window for all layers; its class ignores the list")
    layers = keys.size("num_hidden_layers")
    return {
        **_common(keys),
        "kv_heads": keys.optional("num_key_value_heads", 8) or keys.size("num_attention_heads"),
        "head_dim": _head_dim(keys),
        **_pattern([_FULL if window is None else _SLIDING] * layers, window, keys),
        **rope_fields(keys, 10_000.0),
    }


def _one_window(model: ModelConfig) -> Fields:
    return {"layer_types": LEFT_OUT}


def _qwen_layers(keys: Keys) -> Fields:
    window = keys.optional("sliding_window", 4096) if keys.take("use_sliding_window", False) else None
    keys.take("sliding_window", None)
    first, layers = keys.take("max_window_layers", 28), keys.size("num_hidden_layers")
    default = [_SLIDING if window is not None and layer >= first else _FULL for layer in range(layers)]
    return _pattern(_layer_types(keys, default), window, keys)


def _qwen2(keys: Keys) -> Fields:
    common = _common(keys)
    return {
        **common,
        "head_dim": _head_dim(keys),
        "attention_bias": "qkv",
        **_qwen_layers(keys),
        **rope_fields(keys, 10_000.0),
    }


def _qwen3(keys: Keys) -> Fields:
    return {
        **_common(keys),
        "head_dim": _head_dim(keys, 128),
        "qk_norm": True,
        "attention_bias": "all" if keys.take("attention_bias", False) else "none",
        **_qwen_layers(keys),
        **rope_fields(keys, 10_000.0),
    }


def _olmo(keys: Keys) -> Fields:
    return {
        **_common(keys, eps=1e-5),
        "head_dim": _head_dim(keys),
        "norm": "post",
        "qk_norm": True,
        "qk_norm_dim": "width",
        "attention_bias": "all" if keys.take("attention_bias", False) else "none",
    }


def _olmo2(keys: Keys) -> Fields:
    return {**_olmo(keys), **rope_fields(keys, 10_000.0)}


def _olmo3(keys: Keys) -> Fields:
    layers = keys.size("num_hidden_layers")
    default = [_FULL if (layer + 1) % 4 == 0 else _SLIDING for layer in range(layers)]
    pattern = _pattern(_layer_types(keys, default), keys.optional("sliding_window", 4096), keys)
    # Scaling in the old form is of the full layers alone.
    return {**_olmo(keys), **pattern, **rope_fields(keys, 500_000.0, sliding=500_000.0)}


def _gemma3(keys: Keys) -> Fields:
    layers, every = keys.size("num_hidden_layers"), keys.take("sliding_window_pattern", 6)
    default = [_SLIDING if (layer + 1) % every else _FULL for layer in range(layers)]
    pattern = _pattern(_layer_types(keys, default), keys.optional("sliding_window", 4096), keys)
    keys.expect("use_bidirectional_attention", False, "decoders are causal")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.expect(name, None, "logits are not capped")
    dim, scalar = keys.size("hidden_size"), keys.take("query_pre_attn_scalar", 256)
    local = keys.take("rope_local_base_freq", 10_000.0)
    return {
        **_common(keys, act="hidden_activation", tied=True),
        "activation": ACTIVATIONS[keys.take("hidden_activation", "gelu_pytorch_tanh")],
        "kv_heads": keys.optional("num_key_value_heads", 4),
        "head_dim": _head_dim(keys, 256),
        "norm": "both",
        "norm_plus_one": True,
        "qk_norm": True,
        "query_scale": float(scalar) ** -0.5,
        "embedding_scale": float(dim) ** 0.5,
        "attention_bias": "all" if keys.take("attention_bias", False) else "none",
        **pattern,
        **rope_fields(keys, 1_000_000.0, sliding=local),
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
    )
}


def family_of(model_type: Any) -> Family:
    """Returns the family of that ``model_type``. Raises ``ConfigError`` for one that is not trained exactly here."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type={model_type!r} is not one of the families that are computed exactly here: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
