"""Writes positions into a ``config.json`` as transformers 5 reads them, and as transformers 4 does, equal.

Base and original length stand inside ``rope_parameters`` and beside it, and ``max_position_embeddings`` is what the
scaling makes of the original: readers differ in what they take from where, and guess what is missing.
"""

from __future__ import annotations

from typing import Any

from longctx.config import ModelConfig
from longctx.config.sections.rope import RopeConfig
from longctx.huggingface.family import FULL, SLIDING, Family
from longctx.huggingface.rope_in import LONGEST, ORIGINAL
from longctx.rope import TYPES

# What transformers 4 has under the same names.
_OF_VERSION_4 = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_keys(family: Family, model: ModelConfig, lengths: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys that state positions, and what transformers 4 would compute otherwise, in words.

    ``lengths``: ``max_position_embeddings`` and its original.
    """
    if family.nope and model.rope.type == "none":
        return {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, []
    full = _section(model, model.rope, lengths)
    scaled = full if full["rope_type"] != "default" else None
    keys = {"rope_parameters": full, "rope_theta": full["rope_theta"], "rope_scaling": scaled, **lengths}
    others = [] if full["rope_type"] in _OF_VERSION_4 else [f"rope_type={full['rope_type']}"]
    if "partial_rotary_factor" in full:
        keys["partial_rotary_factor"] = full["partial_rotary_factor"]
    if family.by_layer:
        window = _section(model, model.rope_of("W"), lengths)
        keys["rope_parameters"] = {FULL: full, SLIDING: window}
        if window["rope_type"] != "default":
            others.append(f"rope_type={window['rope_type']} of layers with a window")
        if family.window_theta is not None:
            keys[family.window_theta] = window["rope_theta"]
        elif window["rope_theta"] != full["rope_theta"]:
            others.append(f"rope_theta={window['rope_theta']} of layers with a window")
    return keys, others


def _section(model: ModelConfig, rope: RopeConfig, lengths: dict[str, int]) -> dict[str, Any]:
    theta = rope.rope_theta or model.rope_theta
    share = {} if rope.partial_rotary_factor == 1.0 else {"partial_rotary_factor": rope.partial_rotary_factor}
    if rope.type == "ntk":  # has no name elsewhere: it is another base
        assert rope.factor is not None, "checked"
        turned = int(model.head_dim * rope.partial_rotary_factor)
        return {"rope_type": "default", "rope_theta": theta * rope.factor ** (turned / (turned - 2)), **share}
    kind = TYPES[rope.type]
    stated = {
        name: list(value) if isinstance(value, tuple) else value
        for name in (*kind.needs, *kind.reads)
        if name != LONGEST and (value := getattr(rope, name)) is not None
    }
    section = {"rope_type": rope.type, "rope_theta": theta, **share, **stated}
    if rope.type == "longrope" and rope.factor != lengths[LONGEST] / lengths[ORIGINAL]:
        # Versions derive it from other keys; stated, it is one number.
        section["attention_factor"] = rope.table(theta, model.head_dim).factor
    return section


def lengths_of(model: ModelConfig, seq_len: int, before: dict[str, Any] | None, changed: bool) -> dict[str, int]:
    """Returns ``max_position_embeddings`` and its original for a model that was trained at ``seq_len``.

    ``before``: the configuration that it began with. ``changed``: its positions are not those any more.
    """
    rope, known = model.rope, before or {}
    longest = known.get(LONGEST)
    factor = rope.factor or 1.0
    if rope.original_max_position_embeddings is not None:
        original = rope.original_max_position_embeddings
    else:
        stated = known.get(ORIGINAL) or (longest if changed or rope.factor is None else None)
        original = stated or max(1, round((longest or seq_len) / factor))
    if rope.type == "yarn":
        return {LONGEST: round(factor * original), ORIGINAL: original}
    if rope.max_position_embeddings is not None:  # the table follows from it
        stated = known.get(ORIGINAL) or rope.original_max_position_embeddings
        return {LONGEST: rope.max_position_embeddings, ORIGINAL: stated or rope.max_position_embeddings}
    if longest is not None and not changed:
        return {LONGEST: longest, ORIGINAL: original}
    return {LONGEST: max(round(factor * original), seq_len if rope.type == "default" else 1), ORIGINAL: original}
