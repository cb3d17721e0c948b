"""Cuts a corpus of text into batches for workers, the same ones however often and from wherever it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from longctx.data.json_lines import name_of
from longctx.data.source import TextFiles

UNIT = 1 << 19  # bytes of text that make a batch full


@dataclass(frozen=True)
class Position:
    """Says how far a corpus has been read: ``taken`` documents of file number ``file``.

    ``notes``: what was noted in the files before it.
    """

    file: int = 0
    taken: int = 0
    notes: dict[str, int] = field(default_factory=dict)


@dataclass
class Unit:
    """Holds documents that one worker encodes at once. ``end``: the position after the last of them."""

    end: Position
    contents: list[bytes] = field(default_factory=list)
    places: list[tuple[Path, int, bool]] = field(default_factory=list)
    size: int = 0

    def name(self, number: int) -> str:
        """Names a document of this batch, for messages."""
        return name_of(*self.places[number])


def units_of(texts: TextFiles, start: Position, notes: Counter[str], at: Callable[[int, int], None]) -> Iterator[Unit]:
    """Yields batches of the documents from ``start`` on; a long document is one of its own.

    ``notes``: counts what was passed over, from the corpus's beginning. ``at(file, bytes)``: told how far it has read.
    """
    notes.update(start.notes)
    unit = Unit(start)
    for number in range(start.file, len(texts.paths)):
        before, taken = dict(notes), 0
        skipped = start.taken if number == start.file else 0
        for found in texts.read(number, notes, lambda position, number=number: at(number, position)):  # type: ignore[misc]
            for place, content in zip(found.places, found.contents, strict=True):
                taken += 1
                if taken <= skipped:
                    continue
                if unit.contents and unit.size + len(content) > UNIT:
                    yield unit
                    unit = Unit(unit.end)
                unit.contents.append(content)
                unit.places.append((found.path, place, found.in_array))
                unit.size += len(content)
                unit.end = Position(number, taken, before)
    if unit.contents:
        yield unit
