"""Defines what a family of models is, and reads what many families say in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longctx.config import ModelConfig
from longctx.huggingface.keys import Keys
from longctx.huggingface.names import PLAIN, Names

Fields = dict[str, Any]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_LETTERS = {FULL: "S", SLIDING: "W"}
LAYER_TYPES = {"S": FULL, "W": SLIDING, "L": LINEAR}
LEFT_OUT = object()


def _nothing(model: ModelConfig) -> Fields:
    return {}


@dataclass(frozen=True)
class Family:
    """Declares a family: its ``model_type``, the class that holds it, and how its file is read and written.

    ``fields(keys)``: fields of ``model``. ``names``: those of its weights. A file is written with those keys of
    ``config_out.common_keys`` that ``fields`` reads. ``own(model)``: keys that it has beside them, or otherwise;
    ``LEFT_OUT`` where it lacks a common one. ``by_layer``: layers with a window have positions of their own, and
    ``window_theta`` is what transformers 4 calls their base. ``nope``: a base of null stands for no positions.
    ``kept``: entries of ``rope_parameters`` that change nothing of text, and stay as they were found.
    ``inside``: the key of a larger model's file that holds this one, and that model's ``model_type``.
    """

    model_type: str
    architecture: str
    fields: Callable[[Keys], Fields]
    names: Names = PLAIN
    own: Callable[[ModelConfig], Fields] = _nothing
    by_layer: bool = False
    window_theta: str | None = None
    nope: bool = False
    kept: tuple[str, ...] = ()
    inside: tuple[str, str] | None = None


def common(keys: Keys, act: str = "hidden_act", eps: float = 1e-6, tied: bool = False) -> Fields:
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


def head_dim_of(keys: Keys, default: int | None = None) -> int:
    return keys.optional("head_dim") or default or keys.size("hidden_size") // keys.size("num_attention_heads")


def pattern_of(types: list[str], window: int | None, keys: Keys, letters: Mapping[str, str] = _LETTERS) -> Fields:
    """Returns the letters of a list of layer types, the shortest repeated part of it, and the window."""
    unknown = sorted(set(types) - set(letters))
    if unknown:
        keys.refuse("layer_types", unknown, f"layers are {', '.join(letters)}")
    if len(types) != keys.size("num_hidden_layers"):
        keys.refuse("layer_types", f"{len(types)} entries", f"num_hidden_layers={keys.size('num_hidden_layers')}")
    if SLIDING in types and window is None:
        keys.refuse("sliding_window", None, "layer_types has sliding layers")
    kinds = "".join(letters[one] for one in types)
    shortest = next(kinds[:n] for n in range(1, len(kinds) + 1) if (kinds[:n] * len(kinds))[: len(kinds)] == kinds)
    return {"pattern": shortest, "window": window if "W" in kinds else None}


def layer_types(keys: Keys, default: list[str]) -> list[str]:
    given = keys.take("layer_types", None)
    return default if given is None else list(given)
