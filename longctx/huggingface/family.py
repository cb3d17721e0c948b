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


def common(
    keys: Keys,
    act: tuple[str, str] = ("hidden_act", "silu"),
    kv_heads: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
) -> Fields:
    """Returns what all families state. ``act``: the key of the activation; with the others, what the class has."""
    heads = keys.size("num_attention_heads")
    name = keys.word(*act)
    if name not in ACTIVATIONS:
        keys.refuse(act[0], name, f"the MLP is gated by {', '.join(ACTIVATIONS)}")
    keys.expect("attention_dropout", 0.0, "training here has no dropout; set it to 0")
    return {
        "vocab_size": keys.size("vocab_size"),
        "dim": keys.size("hidden_size"),
        "layers": keys.layers,
        "heads": heads,
        "kv_heads": keys.optional("num_key_value_heads", kv_heads) or heads,
        "hidden_dim": keys.size("intermediate_size"),
        "activation": ACTIVATIONS[name],
        "norm_eps": keys.real("rms_norm_eps", eps),
        "init_std": keys.real("initializer_range", 0.02),
        "tie_embeddings": keys.flag("tie_word_embeddings", tied),
    }


def head_dim_of(keys: Keys, default: int | None = None) -> int:
    if default is not None:
        return keys.size("head_dim", default)
    return keys.optional("head_dim") or keys.size("hidden_size") // keys.size("num_attention_heads")


def biases(keys: Keys) -> Fields:
    return {"attention_bias": "all" if keys.flag("attention_bias", False) else "none"}


def olmo(keys: Keys, eps: float) -> Fields:
    """Returns what softmax layers of OLMo 2, 3 and hybrid are, but for their positions."""
    return {
        **common(keys, eps=eps),
        "head_dim": head_dim_of(keys),
        "norm": "post",
        "qk_norm": True,
        "qk_norm_dim": "width",
        **biases(keys),
    }


def pattern_of(types: list[str], window: int | None, keys: Keys, letters: Mapping[str, str] = _LETTERS) -> Fields:
    """Returns the letters of a list of layer types, the shortest repeated part of it, and the window."""
    unknown = sorted(set(types) - set(letters))
    if unknown:
        keys.refuse("layer_types", unknown, f"layers are {', '.join(letters)}")
    if len(types) != keys.layers:
        keys.refuse("layer_types", f"{len(types)} entries", f"num_hidden_layers={keys.layers}")
    if SLIDING in types and window is None:
        keys.refuse("sliding_window", None, "layer_types has sliding layers")
    kinds = "".join(letters[one] for one in types)
    count = len(kinds)
    shortest = next(kinds[:n] for n in range(1, count + 1) if (kinds[:n] * -(-count // n))[:count] == kinds)
    return {"pattern": shortest, "window": window if "W" in kinds else None}


def layer_types(keys: Keys, default: list[str]) -> list[str]:
    given = keys.words("layer_types")
    return default if given is None else given
