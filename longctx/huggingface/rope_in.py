"""Reads the positions of a ``config.json``: ``rope_parameters`` of transformers 5, ``rope_scaling`` of 4.

What the two versions would compute differently, or would read past in silence, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from longctx.config.parsing import read_value
from longctx.huggingface.family import FULL, SLIDING
from longctx.huggingface.keys import Keys
from longctx.rope import TYPES, RopeSettings

ORIGINAL, LONGEST = "original_max_position_embeddings", "max_position_embeddings"
# A table's own length is the run's to say.
_KNOWN = {name: hint for name, hint in get_type_hints(RopeSettings).items() if name != "length"}


def rope_fields(
    keys: Keys,
    theta: float,
    sliding: float | None = None,
    share: float | None = None,
    ignored: Sequence[str] = (),
    nope: bool = False,
) -> dict[str, Any]:
    """Returns ``rope_theta``, ``rope`` and ``rope_window`` of ``model``.

    ``theta``: what the family's class has by default. ``sliding``: that of its layers with a window, for families
    whose positions differ by layer type; scaling in the old form is then of the full layers alone. ``share``: of the
    channels that turn where the file says nothing, for families that have it. ``ignored``: entries that change nothing.
    ``nope``: a base of null stands for no positions.
    """
    new, old = (_mapping(keys, name, keys.take(name, None), ignored) for name in ("rope_parameters", "rope_scaling"))
    top = keys.optional_real("rope_theta")
    if nope and (old or new).get("rope_theta", keys.take("rope_theta", theta)) is None:
        return {"rope_theta": theta, "rope": {"rope_type": "none"}}
    base = theta if top is None else top
    if sliding is None:
        nested = [name for name in (FULL, SLIDING) if name in {**new, **old}]
        if nested:
            keys.refuse("rope_parameters", new or old, "all layers of this family have the same positions")
        _agree(keys, new, old, base)
        section = _section(keys, new or old, base, share)
        _no_other_base(keys, "rope_theta", top, section["rope_theta"])
        # Said once: whoever sets model.rope_theta changes it.
        return {"rope_theta": section.pop("rope_theta"), "rope": section}
    full, window = _by_layer(keys, new, old, base)
    if top is not None and theta == sliding != top and "rope_theta" not in window:
        keys.refuse("rope_theta", top, f"layers with a window would keep {sliding}; name both in rope_parameters")
    section = _section(keys, full, base, share, nested=True)
    _no_other_base(keys, "rope_theta", top, section["rope_theta"])
    return {
        "rope_theta": section.pop("rope_theta"),
        "rope": section,
        "rope_window": _section(keys, window, sliding, share, nested=True),
    }


def _mapping(keys: Keys, name: str, found: Any, ignored: Sequence[str] = ()) -> Mapping[str, Any]:
    """Returns the entries of a mapping ``found``, each of its type or null."""
    if found is not None and not isinstance(found, Mapping):
        keys.refuse(name, found, "positions are described by a mapping")
    return {
        key: value if hint is None or value is None else read_value(f"{keys.where}: {name}.{key}", hint, value)
        for key, value in (found or {}).items()
        if key not in ignored
        for hint in [_KNOWN.get("rope_type" if key == "type" else key)]
    }


def _by_layer(
    keys: Keys, new: Mapping[str, Any], old: Mapping[str, Any], base: float
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns what stands for full layers and for those with a window."""
    if set(new) - {FULL, SLIDING}:
        keys.refuse("rope_parameters", new, f"positions of this family stand by layer type: {FULL}, {SLIDING}")
    if {FULL, SLIDING} & set(old):
        keys.refuse("rope_scaling", old, "by layer type they stand in rope_parameters")
    if new and FULL not in new:
        keys.refuse("rope_parameters", new, f"positions by layer type name {FULL}")
    full, window = (_mapping(keys, f"rope_parameters.{name}", new.get(name)) for name in (FULL, SLIDING))
    _agree(keys, full, old, base)
    for given in (full, old, window):
        if given.get("type", "default") != "default" and "rope_type" not in given:
            keys.refuse("type", given["type"], "transformers 5 reads it past by layer type; write rope_type")
        if given.get("truncate") is False:
            keys.refuse("truncate", False, "transformers reads it past where positions differ by layer type")
    return full or old, window


def _agree(keys: Keys, new: Mapping[str, Any], old: Mapping[str, Any], base: float) -> None:
    if new and old and {"rope_theta": base, **_plain(new)} != {"rope_theta": base, **_plain(old)}:
        keys.refuse("rope_scaling", dict(old), f"rope_parameters={dict(new)!r} says otherwise; keep one of them")


def _no_other_base(keys: Keys, name: str, outside: Any, inside: float) -> None:
    if outside is not None and outside != inside:
        keys.refuse(name, outside, f"rope_parameters says {inside}, and versions differ in which they read; keep one")


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in given.items() if name != "type" and value is not None}
    return {"rope_type": given.get("type"), **plain} if "type" in given and "rope_type" not in given else plain


def _section(
    keys: Keys, given: Mapping[str, Any], theta: float, share: float | None, nested: bool = False
) -> dict[str, Any]:
    section = {"rope_type": "default", "rope_theta": theta, **_plain(given)}
    if section["rope_type"] not in TYPES or section["rope_type"] in ("ntk", "none"):
        keys.refuse("rope_type", section["rope_type"], f"types are {', '.join(TYPES)}")
    unknown = sorted(set(section) - set(_KNOWN))
    if unknown:
        keys.refuse("rope_parameters", dict(given), f"{', '.join(unknown)} is not understood")
    kind = TYPES[section["rope_type"]]
    stated = keys.optional_real("partial_rotary_factor", share)
    if stated is not None:
        section.setdefault("partial_rotary_factor", stated)
    if share is None and section["rope_type"] != "proportional" and section.get("partial_rotary_factor", 1.0) != 1.0:
        keys.refuse("partial_rotary_factor", section["partial_rotary_factor"], "all channels turn in this family")
    if LONGEST in (*kind.needs, *kind.reads):
        section.setdefault(LONGEST, keys.optional(LONGEST))
    outside = keys.optional(ORIGINAL)
    reads_outside = outside is not None and ORIGINAL in kind.needs and not nested
    if reads_outside and section["rope_type"] == "longrope":
        section[ORIGINAL] = outside  # which all versions take, whatever stands inside
    elif reads_outside and section.setdefault(ORIGINAL, outside) != outside:
        keys.refuse(ORIGINAL, outside, f"rope_parameters says {section[ORIGINAL]}; keep one of them")
    return section
