"""Fills the section ``model`` from the directory that ``model=hf model.path=DIR`` names, under what the user set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longctx.errors import ConfigError
from longctx.huggingface.config_in import model_fields
from longctx.rope import TYPES

_NAME = "hf"
_ANY_TYPE = ("rope_type", "rope_theta", "partial_rotary_factor")


def with_directory_model(model: dict[str, Any], set_keys: Iterable[str]) -> dict[str, Any]:
    """Returns the section ``model``; ``set_keys``: dotted keys that the user set, which win over the directory.

    Raises ``ConfigError`` for a path that nothing reads, or none to read.
    """
    if (model["name"] == _NAME) != (model["path"] is not None):
        raise ConfigError(
            f"model.path={model['path'] or 'null'} with model={model['name']}: a directory is read by model=hf; set "
            "model=hf model.path=DIR, or neither"
        )
    if model["path"] is None:
        return model
    _, fields, _ = model_fields(Path(model["path"]))
    chosen = [key.split(".")[1:] for key in set_keys if key.startswith("model.")]
    for section in ("rope", "rope_window"):
        if [section, "rope_type"] in chosen:
            fields[section] = _read_by(fields.get(section, {}), model[section]["rope_type"])
    if ["rope", "rope_theta"] in chosen and ["rope_theta"] not in chosen:
        fields["rope_theta"] = model["rope"]["rope_theta"]
    filled: dict[str, Any] = {
        name: value if not isinstance(value, dict) else dict(value) for name, value in model.items()
    }
    for name, value in fields.items():
        if not isinstance(value, dict):
            filled[name] = value if [name] not in chosen else model[name]
            continue
        for inner, inner_value in value.items():
            if [name, inner] not in chosen:
                filled[name][inner] = list(inner_value) if isinstance(inner_value, tuple) else inner_value
    return filled


def _read_by(section: dict[str, Any], rope_type: str | None) -> dict[str, Any]:
    """Keeps of the directory's positions what another type reads as well."""
    kind = TYPES.get(rope_type or "default")
    reads = () if kind is None else (*_ANY_TYPE, *kind.needs, *kind.reads)
    return {name: value for name, value in section.items() if name in reads}
