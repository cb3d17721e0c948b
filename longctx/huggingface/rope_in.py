"""Reads the positions of a ``config.json``: ``rope_parameters`` of transformers 5, ``rope_scaling`` of 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from longctx.huggingface.keys import Keys
from longctx.rope import TYPES, RopeSettings

FULL, SLIDING = "full_attention", "sliding_attention"
_KNOWN = {one.name for one in fields(RopeSettings)}


def rope_fields(keys: Keys, theta: float, sliding: float | None = None) -> dict[str, Any]:
    """Returns ``rope_theta``, ``rope`` and ``rope_window`` of ``model``.

    ``theta``: what the family's class has by default. ``sliding``: that of its layers with a window, for families
    whose positions differ by layer type; scaling in the old form is then of the full layers alone.
    """
    new, old = keys.take("rope_parameters", None), keys.take("rope_scaling", None)
    top = keys.take("rope_theta", None)
    if new and old and _plain(new) != _plain(old):
        keys.refuse("rope_scaling", old, f"rope_parameters={new!r} says otherwise; keep one of them")
    given: Mapping[str, Any] = new or old or {}
    by_layer = {name: given[name] for name in (FULL, SLIDING) if name in given}
    whole = {} if by_layer else given
    base = theta if top is None else float(top)
    found = {"rope": _section(keys, by_layer.get(FULL, whole), base)}
    if by_layer and FULL not in by_layer:
        keys.refuse("rope_parameters", given, f"positions by layer type name {FULL}")
    if sliding is not None or by_layer:
        if (
            top is not None
            and sliding is not None
            and float(top) != sliding
            and SLIDING not in by_layer
            and theta == sliding
        ):
            keys.refuse("rope_theta", top, f"layers with a window would keep {sliding}; name both in rope_parameters")
        found["rope_window"] = _section(keys, by_layer.get(SLIDING, {}), base if sliding is None else sliding)
    # Said once: whoever sets model.rope_theta changes it.
    return {"rope_theta": found["rope"].pop("rope_theta"), **found}


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in given.items() if name != "type" and value is not None}
    return {"rope_type": given.get("type"), **plain} if "type" in given and "rope_type" not in given else plain


def _section(keys: Keys, given: Mapping[str, Any] | None, theta: float) -> dict[str, Any]:
    """Returns one section; None in the file stands for layers without positions."""
    if given is None:
        return {"rope_type": "none", "rope_theta": theta}
    section = {"rope_type": "default", "rope_theta": theta, **_plain(given)}
    if section["rope_type"] not in TYPES or section["rope_type"] in ("ntk", "none"):
        keys.refuse("rope_type", section["rope_type"], f"types are {', '.join(TYPES)}")
    unknown = sorted(set(section) - _KNOWN)
    if unknown:
        keys.refuse("rope_parameters", given, f"{', '.join(unknown)} is not understood")
    kind = TYPES[section["rope_type"]]
    partial = keys.take("partial_rotary_factor", None)
    if partial is not None:
        section.setdefault("partial_rotary_factor", float(partial))
    if "max_position_embeddings" in (*kind.needs, *kind.reads):
        section.setdefault("max_position_embeddings", keys.optional("max_position_embeddings"))
    outside = keys.take("original_max_position_embeddings", None)
    if outside is not None and "original_max_position_embeddings" in kind.needs:
        section.setdefault("original_max_position_embeddings", outside)
    return {name: _number(value) if name != "truncate" else value for name, value in section.items()}


def _number(value: Any) -> Any:
    """Whole numbers stay, lists become tuples of real ones."""
    return tuple(float(one) for one in value) if isinstance(value, list | tuple) else value
