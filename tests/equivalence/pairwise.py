"""A small sample of a product of axes in which every pair of values of two axes occurs."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

Axis = Sequence[Hashable]
Pair = tuple[tuple[int, Hashable], tuple[int, Hashable]]


def pairwise(axes: Sequence[Axis]) -> list[tuple[Hashable, ...]]:
    """Greedy and deterministic; where values serve equally well the first one of an axis is taken."""
    missing: dict[Pair, None] = {
        ((i, a), (j, b)): None
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(axes[i], axes[j])
    }
    rows = []
    while missing:
        chosen: dict[int, Hashable] = dict(next(iter(missing)))
        for index, axis in enumerate(axes):
            if index not in chosen:
                gains = [sum(pair in missing for pair in _pairs({**chosen, index: value})) for value in axis]
                chosen[index] = axis[gains.index(max(gains))]
        for pair in _pairs(chosen):
            missing.pop(pair, None)
        rows.append(tuple(chosen[index] for index in range(len(axes))))
    return rows


def _pairs(chosen: dict[int, Hashable]) -> list[Pair]:
    return list(itertools.combinations(sorted(chosen.items(), key=lambda item: item[0]), 2))
