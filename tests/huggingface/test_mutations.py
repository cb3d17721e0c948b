"""Whatever a key of ``config.json`` holds, it is read as it is meant or refused by name, and nothing crashes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from longctx.config import ModelConfig
from longctx.errors import ConfigError
from longctx.huggingface.config_in import fields_of
from longctx.huggingface.families import FAMILIES
from longctx.huggingface.keys import Keys
from longctx.huggingface.writing.config_out import model_of
from tests.huggingface.small_models import CASES, SIZES, transformers

# By kind, as JSON has them; of the last two no number is made.
VALUES: dict[str, list[Any]] = {
    "word": ["x", "", "false", "1", "silu"],
    "flag": [True, False],
    "number": [0, -1, 1, 3, 10**9, 10**400, 0.0, -0.5, 2.5, float("inf"), float("nan")],
    "list": [[], [1, None], ["x"], [[]], ["silu"], [1.0, "x"]],
    "mapping": [{}, {"x": 1}, {"rope_type": 3}],
    "null": [None],
}
KINDS = {str: "word", bool: "flag", int: "number", float: "number", list: "list", dict: "mapping", type(None): "null"}
# Read or harmless where a file of an older version has them.
OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window_pattern", "rope_local_base_freq")
ENTRIES = (
    *("type", "rope_type", "rope_theta", "factor", "truncate", "short_factor", "attention_factor", "mscale", "length"),
    *("original_max_position_embeddings", "partial_rotary_factor", "full_attention", "sliding_attention", "x"),
)


def stated(name: str) -> dict[str, Any]:
    kind, own = CASES[name]
    values: dict[str, Any] = json.loads(getattr(transformers, kind)(**{**SIZES, **own}).to_json_string(use_diff=False))
    return values


def read(values: dict[str, Any]) -> ModelConfig | None:
    """None where it is refused; no other error may come."""
    try:
        return model_of(values, "config.json")
    except ConfigError:
        return None


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    inner = value if not rest else changed(values.get(key) or {}, tuple(rest), value)
    return {**values, key: inner}


def places(values: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    keys = Keys(values, "config.json")
    FAMILIES[values["model_type"]].fields(keys)
    for name in sorted({*values, *keys.read, *OLDER}):
        yield (name,), values.get(name)
    for name in ("rope_parameters", "rope_scaling"):
        given = values.get(name) or {}
        for section in [(name,), *((name, one) for one in given if isinstance(given[one], dict))]:
            inner = given if len(section) == 1 else given[section[1]]
            for entry in sorted({*inner, *ENTRIES}):
                yield (*section, entry), inner.get(entry)


@pytest.mark.parametrize("name", CASES)
def test_a_value_of_another_kind_is_refused_or_changes_nothing(name: str) -> None:
    values = stated(name)
    before = read(values)
    assert before is not None
    wrong = []
    for path, own in places(values):
        for kind, others in VALUES.items():
            for value in others:
                found = read(changed(values, path, value))
                # True is 1 to Python, and to transformers; null stands for what is left out.
                other = own is not None and kind not in (KINDS[type(own)], "null")
                if other and found not in (None, before) and value != own:
                    wrong.append((path, value, own))
    assert not wrong


@pytest.mark.parametrize(
    ("name", "key", "value", "told"),
    [
        ("llama", "rms_norm_eps", None, "=None is not computed here: a number above 0"),
        ("llama", "hidden_act", ["silu"], r"=\['silu'\] is a list, expected a string"),
        ("llama", "tie_word_embeddings", "false", "='false' is a string, expected true or false; write false"),
        ("llama", "num_hidden_layers", 10**9, "=1000000000 .* at most 65536 layers"),
        ("qwen2", "max_window_layers", None, "=None .* a whole number of at least 0"),
        ("gemma3", "sliding_window_pattern", 0, "=0 .* a whole number of at least 1"),
        ("gemma3", "query_pre_attn_scalar", -1, r"=-1.0 .* a number above 0"),
        ("olmo3", "layer_types", [1, None], r"\[0\]=1 is an integer, expected a string"),
        ("qwen3", "rope_theta", "x", "='x' is a string, expected a number"),
        ("qwen3", "rope_parameters", {"short_factor": [1.0, "x"]}, r".short_factor\[1\]='x' is a string"),
        (
            "olmo3",
            "rope_parameters",
            {"full_attention": {"rope_type": []}},
            r".full_attention.rope_type=\[\] is a list",
        ),
    ],
)
def test_a_refusal_names_key_value_and_rule(name: str, key: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}{told}"):
        fields_of({**stated(name), key: value}, "config.json")


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_is_what_its_class_has(name: str) -> None:
    values = stated(name)
    kind = getattr(transformers, CASES[name][0])
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias"):
        left = {other: value for other, value in values.items() if other != key}
        try:
            whole = json.loads(kind(**copy.deepcopy(left)).to_json_string(use_diff=False))
        except Exception:  # its class has none that fits the others
            continue
        found, expected = read(left), read(whole)
        assert found == expected, key
