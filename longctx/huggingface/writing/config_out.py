"""Writes ``config.json`` of a model as the family that computes it: what is written is read back and must be equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from longctx.config import Config, ModelConfig
from longctx.config.parsing import parse
from longctx.config.sections.model import SOFTMAX_KINDS
from longctx.errors import ConfigError
from longctx.huggingface.config_in import fields_of, text_model
from longctx.huggingface.families import FAMILIES
from longctx.huggingface.family import ACTIVATIONS, LAYER_TYPES, LEFT_OUT, Family
from longctx.huggingface.hybrids import TAPS
from longctx.huggingface.keys import Keys
from longctx.huggingface.rope_in import LONGEST
from longctx.huggingface.writing.rope_out import lengths_of, rope_keys

# What decides no number of a forward pass, or is compared by the tables that follow from it.
_NOT_COMPARED = ("name", "path", "init_std", "pattern", "rope_theta", "rope", "rope_window", "linear")
_BEGAN = "the directory that the run began with"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Written:
    """Holds a configuration as it is to be written: its family, its keys, and what is to be said about it."""

    family: Family
    keys: dict[str, Any]
    notes: list[str]
    alone: bool = False  # it was a part of a larger model's file


def config_of(model: ModelConfig, seq_len: int, before: Mapping[str, Any] | None, dtype: str) -> Written:
    """Returns the configuration of ``model``, which was trained at ``seq_len``.

    ``before``: the keys that it began with; what changes no number stays as it was there. ``dtype``: of its weights.
    Raises ``ConfigError`` where no family computes the model.
    """
    model = model.settled(seq_len)
    began, alone = None, False
    if before is not None:
        inner, _ = text_model(dict(before), _BEGAN)
        before, alone = inner, inner != before
        began = fields_of(inner, _BEGAN)[0]
    families = [began] if began else []
    families += [family for family in FAMILIES.values() if family is not began]
    nearest: tuple[int, str] | None = None
    for family in families:
        try:
            found = _written(family, model, seq_len, dict(before) if before and family is began else None, dtype)
            wrong = _differences(family, found.keys, model, seq_len)
        except ConfigError as error:  # its file cannot say what this model has
            wrong = [str(error)]
        else:
            if not wrong:
                return replace(found, alone=alone)
        if nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{family.model_type} would have {', '.join(wrong)}"
    assert nearest is not None, "there are families"
    raise ConfigError(
        f"no family of Hugging Face computes this model, so it cannot be exported exactly; nearest: {nearest[1]}"
    )


def _written(family: Family, model: ModelConfig, seq_len: int, before: dict[str, Any] | None, dtype: str) -> Written:
    stated = {**common_keys(model), **family.own(model)}
    stated = {name: value for name, value in stated.items() if value is not LEFT_OUT}
    keys = Keys({**stated, LONGEST: seq_len}, family.model_type)
    family.fields(keys)
    own = {name: value for name, value in stated.items() if name in keys.read}
    notes: list[str] = []
    if before is None:
        # Left out they would be the class's, of another vocabulary.
        base: dict[str, Any] = {**dict.fromkeys(_TOKENS), **own}
        changed = True
    else:
        wrong = _differences(family, before, model, seq_len)
        changed = any(word.startswith("rope") for word in wrong)
        base = {**before, **own} if [word for word in wrong if not word.startswith("rope")] else dict(before)
    lengths = lengths_of(model, seq_len, before, changed)
    rope, others = rope_keys(family, model, lengths)
    positions = (before or {}).get("rope_parameters") or {}
    rope["rope_parameters"] |= {name: positions[name] for name in family.kept if name in positions}
    if others:
        notes.append(f"transformers 4 has no {' and no '.join(others)}, and computes otherwise; take version 5")
    if before and before.get(LONGEST) not in (None, lengths[LONGEST]):
        notes.append(f"{LONGEST}={lengths[LONGEST]} (was {before[LONGEST]})")
    base.pop("auto_map", None)  # names code that is not carried
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    return Written(family, {**names, **base, **names, **rope, "dtype": dtype, "torch_dtype": dtype}, notes)


def common_keys(model: ModelConfig) -> dict[str, Any]:
    """States a model in the words that families have in common; each has some of them."""
    windowed = "W" in model.kinds
    activation = next(name for name, own in ACTIVATIONS.items() if own == model.activation)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.hidden_dim,
        "hidden_act": activation,
        "hidden_activation": activation,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.attention_bias == "all",
        "attention_dropout": 0.0,
        "mlp_bias": model.mlp_bias,
        "layer_types": [LAYER_TYPES.get(kind, kind) for kind in model.kinds],
        "sliding_window": model.window if windowed else None,
        "use_sliding_window": windowed,
        "max_window_layers": model.kinds.find("W") if windowed else model.layers,
    }


def model_of(keys: Mapping[str, Any], where: str) -> ModelConfig:
    """Returns the model that a configuration states, with all of its rules checked."""
    _, stated, _ = fields_of(dict(keys), where)
    model = parse(ModelConfig, {**Config().to_dict()["model"], **_plain(stated), "path": None}, "model.")
    model.check()
    return model


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _differences(family: Family, keys: Mapping[str, Any], model: ModelConfig, seq_len: int) -> list[str]:
    """Lists in words what a configuration computes otherwise than ``model``."""
    try:
        read = model_of(keys, f"config.json of {family.model_type}").settled(seq_len)
    except ConfigError as error:
        return [str(error)]
    wrong = [
        f"{one.name}={getattr(read, one.name)} for {getattr(model, one.name)}"
        for one in fields(ModelConfig)
        if one.name not in _NOT_COMPARED and getattr(read, one.name) != getattr(model, one.name)
    ]
    if read.kinds != model.kinds:
        return [*wrong, f"pattern={read.kinds} for {model.kinds}"]
    if "L" in model.kinds and _linear(read) != _linear(model):
        wrong.append(f"linear={_linear(read)} for {_linear(model)}")
    softmax = [kind for kind in dict.fromkeys(model.kinds) if kind in SOFTMAX_KINDS]
    return [
        *wrong,
        *(f"rope of {kind} layers otherwise" for kind in softmax if _table(read, kind) != _table(model, kind)),
    ]


def _linear(model: ModelConfig) -> tuple[Any, ...]:
    """Returns what linear layers have, with what is left out filled in."""
    own = model.linear
    norms = model.norm_of("L"), own.norm_eps or model.norm_eps
    return model.linear_heads, own.conv_taps or TAPS, own.negative_eigenvalues, *norms


def _table(model: ModelConfig, kind: str) -> Any:
    rope = model.rope_of(kind)
    return rope.table(model.rope_theta, model.head_dim)
