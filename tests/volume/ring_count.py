"""Bytes of the ring, counted from the mask alone: who reads which row of whom, hop by hop, as sets of rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from longctx.sequence import Mask, SequencePlan


@dataclass(frozen=True)
class Count:
    """Rows by rank: of keys (as many of values) passed on in a pass, and of dk (as many of dv) sent."""

    keys: list[int]
    gradients: list[int]


def visible(lengths: tuple[int, ...], mask: Mask, length: int) -> np.ndarray:
    """Bool ``[S, S]``, query by key."""
    documents = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(length - sum(lengths), -1)])
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    seen = (documents[:, None] == documents) & (documents[:, None] >= 0)
    seen &= distance >= 0 if mask.causal else True
    seen &= abs(distance) < mask.window if mask.window is not None else True
    return seen


def count(plan: SequencePlan) -> Count:
    """By the rule that the documentation states, in the direction that passes on fewer rows (+1 on a tie)."""
    seen = [visible(tuple(docs.lengths.tolist()), plan.mask, plan.length) for docs in plan.documents]
    held = [plan.positions(rank).tolist() for rank in range(plan.world)]

    @cache
    def reads(reader: int, owner: int) -> set[int]:
        rows = np.zeros(len(held[owner]), dtype=bool)
        for row in seen:
            rows |= row[np.ix_(held[reader], held[owner])].any(axis=0)
        return set(np.flatnonzero(rows).tolist())

    turned = [_turn(direction, [len(rows) for rows in held], reads) for direction in (+1, -1)]
    return min(turned, key=lambda one: sum(one.keys))


def _turn(direction: int, shards: list[int], reads) -> Count:
    world = len(shards)
    keys, gradients = [0] * world, [0] * world
    for owner in range(world):
        block = set(range(shards[owner]))
        holder = owner
        for hop in range(1, world):
            following = (owner + direction * hop) % world
            later = set().union(*(reads((owner + direction * h) % world, owner) for h in range(hop, world)))
            lost = len(block) - len(later)
            # One row, or a thirty-second of the block, is not worth a copy; a block that nobody reads stops.
            if not later or lost > max(1, len(block) // 32):
                block = later
            keys[holder] += len(block)
            gradients[following] += len(block)  # it passes them on, or sends them home
            holder = following
    return Count(keys, gradients)
