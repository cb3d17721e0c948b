"""Says under which names, and cut how, a directory's files hold what ``transformers`` has."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from longctx.config import ModelConfig
from longctx.errors import StorageError
from longctx.huggingface.names import Names, Place, joined_shape
from longctx.huggingface.pieces import in_class
from longctx.huggingface.writing.source import ModelSource

Part = tuple[str, int | None]  # a tensor of a file, and its rows where it is not all
_OWN_LAYER = 1  # where our names have a layer's number


@dataclass(frozen=True)
class Stored:
    """Describes a tensor of a file: its name, shape, and the rows that it holds of what the class has."""

    name: str
    shape: tuple[int, ...]
    rows: slice


def stored_before(source: ModelSource | None, names: Names) -> dict[str, list[Part]]:
    """Returns, by the names of the class, how files held each of its tensors; nothing without a ``source``."""
    if source is None:
        return {}
    parts: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in source.tensors:
        whole, number = in_class(name, names)
        parts[whole].append((number, name))
    return {
        whole: [(name, source.rows[name] if len(held) > 1 else None) for _, name in sorted(held)]
        for whole, held in parts.items()
    }


def stored_tensors(
    place: Place, shapes: Sequence[tuple[int, ...]], model: ModelConfig, names: Names, before: Sequence[Part] | None
) -> list[Stored]:
    """Returns what files hold of one tensor of the class, which joins parameters of these ``shapes``.

    ``before``: how files held it, whose names and cuts are kept; else those of the family's published models.
    """
    whole = joined_shape(shapes)
    found = before or _published(place, shapes, model, names)
    if not whole:
        return [Stored(name, whole, slice(None)) for name, _ in found]
    cuts = [0, *accumulate(rows or whole[0] for _, rows in found)]
    if cuts[-1] != whole[0]:
        raise StorageError(f"{found[0][0]} and what follows it had {cuts[-1]} rows, and have {whole[0]} now")
    return [
        Stored(name, (stop - start, *whole[1:]), slice(start, stop))
        for (name, _), (start, stop) in zip(found, pairwise(cuts), strict=True)
    ]


def _published(place: Place, shapes: Sequence[tuple[int, ...]], model: ModelConfig, names: Names) -> list[Part]:
    name, words = place.name, place.parts[0].split(".")
    if words[0] != "blocks" or model.kinds[int(words[_OWN_LAYER])] != "L":
        return [(name, None)]
    for own, theirs in names.written:
        name = name.replace(own, theirs)
    for whole, parts in (names.split or {}).items():
        if name.endswith(whole):
            start = name.removesuffix(whole)
            return [(start + part, math.prod(shape[:-1])) for part, shape in zip(parts, shapes, strict=True)]
    return [(name, None)]
