"""Maps names of our parameters to those that ``transformers`` has: one to one, or several of ours joined by rows.

Nothing is turned or computed: a tensor of theirs holds the bytes of ours one after another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longctx.config import ModelConfig

_LAYER = re.compile(r"(blocks\.(\d+)\.)(.+)")

_MLP = {"gate.": "mlp.gate_proj.", "up.": "mlp.up_proj.", "mlp_out.": "mlp.down_proj."}
_SOFTMAX = {
    "q.": "self_attn.q_proj.",
    "k.": "self_attn.k_proj.",
    "v.": "self_attn.v_proj.",
    "attention_out.": "self_attn.o_proj.",
    "q_norm.": "self_attn.q_norm.",
    "k_norm.": "self_attn.k_norm.",
}
# Where a branch is normed before and after, four norms need four names.
_NORMS = {
    "pre": {"attention_norm.": "input_layernorm.", "mlp_norm.": "post_attention_layernorm."},
    "post": {"attention_post_norm.": "post_attention_layernorm.", "mlp_post_norm.": "post_feedforward_layernorm."},
    "both": {
        "attention_norm.": "input_layernorm.",
        "attention_post_norm.": "post_attention_layernorm.",
        "mlp_norm.": "pre_feedforward_layernorm.",
        "mlp_post_norm.": "post_feedforward_layernorm.",
    },
}
_ENDS = {"embedding.": "embed_tokens.", "norm.": "norm."}


@dataclass(frozen=True)
class Names:
    """Says how a family names its weights.

    ``prefix``: before those of its decoder. ``linear``: starts of names inside a linear layer, ours to theirs; ours
    that share one of theirs are joined in this order. What files say otherwise than the class: ``renamed`` parts of
    names, theirs to the class's; ``split``: ends of names of the class, and of the tensors that files hold in their
    place, joined by rows, one for each part of ours; ``left_out``: starts of names that the class does not read.
    ``written``: parts of the class's names in linear layers, and what files say.
    """

    prefix: str = "model."
    linear: Mapping[str, str] | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    split: Mapping[str, tuple[str, ...]] | None = None
    left_out: tuple[str, ...] = ()
    written: tuple[tuple[str, str], ...] = ()


PLAIN = Names()


@dataclass(frozen=True)
class Place:
    """Names the tensor of ``transformers`` that holds a parameter, and all ``parts`` of ours that it joins."""

    name: str
    parts: tuple[str, ...]


def place_of(name: str, config: ModelConfig, names: Names = PLAIN) -> Place:
    """Returns where our parameter ``name`` lies."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        start, kind = name.split(".", 1)
        return Place(f"lm_head.{kind}" if start == "head" else f"{names.prefix}{_ENDS[f'{start}.']}{kind}", (name,))
    own, number, inner = layer.groups()
    kind = config.kinds[int(number)]
    mixing = (names.linear or {}) if kind == "L" else _SOFTMAX
    inside = {**mixing, **_MLP, **_NORMS[config.norm_of(kind)]}
    start = next(start for start in inside if inner.startswith(start))
    end = inner.removeprefix(start)
    joined = [other for other, theirs in inside.items() if theirs == inside[start]]
    return Place(f"{names.prefix}layers.{number}.{inside[start]}{end}", tuple(f"{own}{other}{end}" for other in joined))


def published_name(name: str, config: ModelConfig, names: Names = PLAIN) -> str:
    """Returns the name that ``transformers`` has for what holds our parameter ``name``."""
    return place_of(name, config, names).name


def joined_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of what joins parameters of these shapes.

    Filters of several inputs, each ``[H, C, W]``, are one of all their channels, ``[channels, 1, W]``.
    """
    if len(shapes) == 1:
        return shapes[0]
    rows = sum(math.prod(shape[:-1]) for shape in shapes)
    return (rows, *((1,) if len(shapes[0]) == 3 else ()), shapes[0][-1])
