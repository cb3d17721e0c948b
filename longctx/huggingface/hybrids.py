"""Declares the families whose layers are of softmax attention and of the gated delta rule by turns."""

from __future__ import annotations

from longctx.config import ModelConfig
from longctx.huggingface.family import (
    FULL,
    LINEAR,
    Family,
    Fields,
    biases,
    common,
    head_dim_of,
    layer_types,
    olmo,
    pattern_of,
)
from longctx.huggingface.keys import Keys
from longctx.huggingface.names import Names
from longctx.huggingface.rope_in import rope_fields

_LETTERS = {FULL: "S", LINEAR: "L"}
TAPS = 4
# Of text all three grids of positions are equal, so that these change nothing.
_GRIDS = ("mrope_section", "mrope_interleaved")
_EVERY = 4  # one layer in so many has softmax attention, where a file does not list them


def _layers(keys: Keys, default: list[str], **linear: object) -> Fields:
    """Returns the pattern, and what linear layers have otherwise than the others."""
    pattern = pattern_of(layer_types(keys, default), None, keys, _LETTERS)
    if keys.word("hidden_act", "silu") not in ("silu", "swish"):
        keys.refuse("hidden_act", keys.take("hidden_act", None), "linear layers apply silu behind their convolution")
    if "L" not in pattern["pattern"]:
        return pattern
    return {**pattern, "mixer": "gated_deltanet", "linear": linear}


def _qwen3_5(keys: Keys) -> Fields:
    every = keys.size("full_attention_interval", _EVERY)
    keys.expect("attn_output_gate", True, "this family gates what softmax layers read")
    keys.expect("mamba_ssm_dtype", "float32", "states are kept in the dtype of accumulation")
    for name in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mlp_only_layers"):
        keys.take(name, None)  # its class reads none of them
    default = [FULL if (layer + 1) % every == 0 else LINEAR for layer in range(keys.layers)]
    return {
        **common(keys),
        "kv_heads": keys.size("num_key_value_heads", 4),
        "head_dim": head_dim_of(keys, 256),
        "norm_plus_one": True,
        "qk_norm": True,
        "output_gate": True,
        **biases(keys),
        **_layers(
            keys,
            default,
            key_heads=keys.size("linear_num_key_heads", 16),
            value_heads=keys.size("linear_num_value_heads", 32),
            key_head_dim=keys.size("linear_key_head_dim", 128),
            value_head_dim=keys.size("linear_value_head_dim", 128),
            conv_taps=keys.size("linear_conv_kernel_dim", TAPS),
        ),
        **rope_fields(keys, 10_000.0, share=0.25, ignored=_GRIDS),
    }


def _linear_keys(model: ModelConfig) -> Fields:
    heads = model.linear_heads
    return {
        "linear_num_key_heads": heads.key_heads,
        "linear_num_value_heads": heads.value_heads,
        "linear_key_head_dim": heads.key_head_dim,
        "linear_value_head_dim": heads.value_head_dim,
        "linear_conv_kernel_dim": model.linear.conv_taps or TAPS,
        "linear_allow_neg_eigval": model.linear.negative_eigenvalues,
    }


def _olmo_hybrid(keys: Keys) -> Fields:
    heads = keys.size("num_attention_heads")
    key_heads = keys.optional("linear_num_key_heads") or heads
    key_dim = keys.optional("linear_key_head_dim") or int(0.75 * keys.size("hidden_size") / key_heads)
    for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"):
        keys.take(f"linear_{name}", None)  # of models that are drawn anew
    default = [FULL if layer % _EVERY == _EVERY - 1 else LINEAR for layer in range(keys.layers)]
    if FULL not in default:
        default[-1] = FULL
    return {
        **olmo(keys, eps=1e-6),
        **_layers(
            keys,
            default,
            key_heads=key_heads,
            value_heads=keys.optional("linear_num_value_heads") or heads,
            key_head_dim=key_dim,
            value_head_dim=keys.optional("linear_value_head_dim") or 2 * key_dim,
            conv_taps=keys.size("linear_conv_kernel_dim", TAPS),
            negative_eigenvalues=keys.flag("linear_allow_neg_eigval", True),
            norm="pre",
            norm_eps=1e-5,
        ),
        **rope_fields(keys, 10_000.0, nope=True),
    }


_FILTERS = {f"learned.{name}_conv": "linear_attn.conv1d.weight" for name in "qkv"}
_GATES = {"learned.A_log": "linear_attn.A_log", "learned.dt_bias": "linear_attn.dt_bias"}

QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _qwen3_5,
    Names(
        linear={
            **{f"projections.{name}.": "linear_attn.in_proj_qkv." for name in "qkv"},
            "projections.a.": "linear_attn.in_proj_a.",
            "projections.b.": "linear_attn.in_proj_b.",
            "out_gate.": "linear_attn.in_proj_z.",
            "out_norm.": "linear_attn.norm.",
            "attention_out.": "linear_attn.out_proj.",
            **_FILTERS,
            **_GATES,
        },
        renamed=(("model.language_model.", "model."),),
        left_out=("mtp.", "model.visual.", "visual."),
    ),
    own=_linear_keys,
    kept=_GRIDS,
    inside=("text_config", "qwen3_5"),
)
OLMO_HYBRID = Family(
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    _olmo_hybrid,
    Names(
        linear={
            **{f"projections.{name}.": f"linear_attn.{name}_proj." for name in "qkvab"},
            "out_gate.": "linear_attn.g_proj.",
            "out_norm.": "linear_attn.o_norm.",
            "attention_out.": "linear_attn.o_proj.",
            **_FILTERS,
            **_GATES,
        },
        renamed=(
            ("attention_layer_norm", "input_layernorm"),
            ("feedforward_layer_norm", "post_attention_layernorm"),
        ),
        split={"linear_attn.conv1d.weight": tuple(f"linear_attn.{name}_conv1d.weight" for name in "qkv")},
        left_out=("mtp.",),
        written=(("input_layernorm", "attention_layer_norm"), ("post_attention_layernorm", "feedforward_layer_norm")),
    ),
    own=_linear_keys,
    nope=True,
)
