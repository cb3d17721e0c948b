"""Visibility, layouts and shards by brute force: cell by cell, from the definitions, sharing no code with longctx."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from longctx.sequence import Contiguous, Documents, Explicit, Layout, Mask, SequencePlan, Striped, Zigzag

Cell = tuple[int, int]


def document_of(lengths: list[int], position: int) -> int | None:
    """Number of the document that holds a position; None for padding."""
    for number, length in enumerate(lengths):
        if position < length:
            return number
        position -= length
    return None


def allowed(lengths: list[int], mask: Mask, query: int, key: int) -> bool:
    """May the query see the key? By the sentences of the contract."""
    if document_of(lengths, query) is None or document_of(lengths, query) != document_of(lengths, key):
        return False
    if mask.causal and key > query:
        return False
    return mask.window is None or abs(query - key) <= mask.window - 1


def allowed_cells(lengths: list[int], mask: Mask, length: int) -> set[Cell]:
    return {(q, k) for q in range(length) for k in range(length) if allowed(lengths, mask, q, k)}


def tile_cells(tile) -> list[Cell]:
    """Cells of a tile in local rows, by the sentences of its docstring."""
    cells = []
    for i in range(tile.q_stop - tile.q_start):
        first = tile.k_start + (i if tile.lower else 0)
        last = tile.k_stop - (tile.q_stop - tile.q_start - 1 - i if tile.upper else 0)
        assert first < last, f"query {i} of {tile} sees nothing"
        cells += [(tile.q_start + i, key) for key in range(first, last)]
    return cells


@dataclass(frozen=True)
class Example:
    """A packed batch and its cut."""

    packing: tuple[tuple[int, ...], ...]  # document lengths by batch row
    mask: Mask
    layout: Layout
    length: int
    world: int
    multiple: int = 1

    @property
    def documents(self) -> tuple[Documents, ...]:
        return tuple(Documents.from_lengths(row) for row in self.packing)

    def plan(self) -> SequencePlan:
        return SequencePlan(self.documents, self.mask, self.layout, self.length, self.world, self.multiple)


@st.composite
def packings(draw, length: int) -> tuple[int, ...]:
    """Documents whose lengths leave some padding, or none; single tokens and shard-sized ones are common."""
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0 and draw(st.integers(0, 9)):
        lengths.append(min(left, draw(st.sampled_from((1, 1, 2, 3, 4, 5, 8, 12, length)))))
    return tuple(lengths)


@st.composite
def explicit_layouts(draw, length: int, world: int) -> Explicit:
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=8))) if length > 1 else []
    spans: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for start, stop in zip([0, *cuts], [*cuts, length]):
        spans[draw(st.integers(0, world - 1))].append((start, stop))
    return Explicit(tuple(tuple(rank) for rank in spans))


@st.composite
def layouts(draw, length: int, world: int) -> Layout:
    kind = draw(st.sampled_from(("contiguous", "zigzag", "striped", "blocks", "explicit")))
    if kind == "blocks":
        return Striped(draw(st.integers(2, 7)))
    if kind == "explicit":
        return draw(explicit_layouts(length, world))
    return {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}[kind]


@st.composite
def examples(draw, longest: int = 40, rows: int = 3) -> Example:
    length, world = draw(st.integers(1, longest)), draw(st.integers(1, 9))
    window = draw(st.one_of(st.none(), st.integers(1, longest + 3)))
    packing = [draw(packings(length)) for _ in range(draw(st.integers(1, rows)))]
    return Example(
        packing=tuple(packing),
        mask=Mask(draw(st.booleans()), window),
        layout=draw(layouts(length, world)),
        length=length,
        world=world,
        multiple=draw(st.sampled_from((1, 1, 2, 3))),
    )
