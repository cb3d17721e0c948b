"""The cases on which sharded attention must equal attention by its definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx.sequence import Contiguous, Documents, Layout, Mask, SequencePlan, Striped, Zigzag, make_plan
from tests.equivalence.pairwise import pairwise

LAYOUTS: dict[str, Layout] = {
    "contiguous": Contiguous(),
    "zigzag": Zigzag(),
    "striped": Striped(),
    "striped4": Striped(4),
}
MASKS = (
    "causal",
    "full",
    "documents causal",
    "documents full",
    "window causal",
    "window full",
    "documents window causal",
    "documents window full",
)
HEADS = {"mha": (2, 2), "gqa4": (8, 2), "mqa": (4, 1)}
LENGTHS = (31, 997, 3, 1, 3821)  # 3 and 1 leave ranks empty
WORLDS = (2, 3, 4, 8, 1)
DIM = 8


@dataclass(frozen=True)
class Problem:
    """What is computed, however it is cut."""

    mask_name: str
    heads_name: str
    length: int

    @property
    def mask(self) -> Mask:
        window = max(1, self.length // 5) if "window" in self.mask_name else None
        return Mask("causal" in self.mask_name, window)

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, key/value heads."""
        return HEADS[self.heads_name]

    @property
    def packing(self) -> tuple[tuple[int, ...], ...]:
        """Document lengths of two batch rows; one row for the longest sequences without documents."""
        length = self.length
        if "documents" not in self.mask_name:
            return ((length,),) if length > 1000 else ((length,), (length,))
        if length < 4:
            return (1,) * length, (1,)
        half = length // 2  # an edge of contiguous and zigzag shards
        padded = tuple(part for part in (length // 4, 1, length // 8, length // 3) if part)
        return (half - 1, 1, 1, length - half - 1), padded


@dataclass(frozen=True)
class Case:
    """A problem and its cut over ranks."""

    layout: str
    mask: str
    heads: str
    length: int
    world: int

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values())).replace(" ", "+")

    @property
    def problem(self) -> Problem:
        return Problem(self.mask, self.heads, self.length)

    def plan(self) -> SequencePlan:
        documents = tuple(Documents.from_lengths(row) for row in self.problem.packing)
        return make_plan(documents, self.problem.mask, LAYOUTS[self.layout], self.length, self.world)


def sampled_cases() -> list[Case]:
    rows = pairwise((tuple(LAYOUTS), MASKS, tuple(HEADS), LENGTHS, WORLDS))
    return [Case(*row) for row in rows]  # type: ignore[arg-type]


def all_cases() -> Iterator[Case]:
    """Cases of one problem follow one another, so that its reference is computed once."""
    for mask, heads, length in itertools.product(MASKS, HEADS, LENGTHS):
        for layout, world in itertools.product(LAYOUTS, WORLDS):
            yield Case(layout, mask, heads, length, world)


@lru_cache(maxsize=4)
def inputs(problem: Problem) -> dict[str, Tensor]:
    """q, k, v and the upstream gradient, whole, ``[B, S, H or Hkv, D]`` in float64."""
    generator = torch.Generator().manual_seed(problem.length)
    heads, kv_heads = problem.heads
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "dout": heads}
    return {
        name: torch.randn(len(problem.packing), problem.length, count, DIM, generator=generator, dtype=torch.float64)
        for name, count in sizes.items()
    }
