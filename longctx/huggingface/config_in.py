"""Reads ``config.json`` of a model directory into fields of ``model``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longctx.errors import ConfigError, DataError
from longctx.huggingface.families import FAMILIES, family_of
from longctx.huggingface.family import Family
from longctx.huggingface.keys import Keys

CONFIG = "config.json"
_LARGEST = 1 << 22
# What a mixture of experts or a compressed cache of keys shows itself by.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_COMPRESSED = ("kv_lora_rank", "q_lora_rank")


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the keys of ``config.json``; those of the text model, where the directory holds several."""
    path = directory / CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {_LARGEST}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; model.path names a directory with it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if type(values) is not dict:
        raise DataError(f"{path} holds {type(values).__name__}, and a configuration is a mapping")
    return values


def model_fields(directory: Path) -> tuple[Family, dict[str, Any], list[str]]:
    """Returns the family of a directory, the fields of ``model`` that it states, and its keys that change no number.

    Raises ``ConfigError`` for what would be computed otherwise than ``transformers`` does.
    """
    return fields_of(read_config(directory), str(directory / CONFIG))


def fields_of(values: dict[str, Any], where: str) -> tuple[Family, dict[str, Any], list[str]]:
    """Returns the same of the keys of a configuration; ``where``: its path, for messages."""
    values, outside = text_model(values, where)
    for names, what in ((_EXPERTS, "a mixture of experts"), (_COMPRESSED, "multi-head latent attention")):
        found = [name for name in names if values.get(name)]
        if found:
            raise ConfigError(f"{where}: {found[0]}={values[found[0]]!r} makes {what}, which is not trained here")
    if values.get("quantization_config"):
        raise ConfigError(f"{where}: weights are quantized (quantization_config); train from the unquantized ones")
    family = family_of(values.get("model_type"))
    keys = Keys(values, where)
    fields = family.fields(keys)
    if "W" not in fields.get("pattern", ""):
        fields.pop("rope_window", None)  # no layer has them
    return family, {"name": "hf", **fields}, [*outside, *keys.finish()]


def text_model(values: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys of the text model of a configuration that holds several, and those that say nothing of it."""
    kinds = {family.inside[1]: family.inside[0] for family in FAMILIES.values() if family.inside}
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in kinds:
        return values, []
    inner = values.get(kinds[model_type])
    if type(inner) is not dict:
        raise ConfigError(f"{where}: model_type={model_type!r} holds its text model in {kinds[model_type]}")
    tied = "tie_word_embeddings"
    if tied in values and tied in inner and values[tied] != inner[tied]:
        raise ConfigError(f"{where}: {tied} is {values[tied]}, and {inner[tied]} in {kinds[model_type]}; make them one")
    if values.get("quantization_config"):
        inner = {**inner, "quantization_config": values["quantization_config"]}
    return {tied: values.get(tied, False), **inner}, sorted(set(values) - {kinds[model_type], tied})
