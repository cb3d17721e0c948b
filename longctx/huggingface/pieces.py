"""Finds parameters in the tensors of a directory's files, where these join or rename what ``transformers`` has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from longctx.checkpoint.manifest import DTYPES, Chunk
from longctx.checkpoint.shards import Located
from longctx.errors import DataError
from longctx.huggingface.names import Names

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def as_published(located: Mapping[str, Located], names: Names, where: Path) -> dict[str, list[Located]]:
    """Returns, by the names that the class of ``transformers`` has, the tensors that make each, in order of rows.

    Raises ``DataError`` where two of them say the same.
    """
    found: dict[str, dict[int, Located]] = {}
    said: dict[tuple[str, int], str] = {}
    for name, one in located.items():
        if name.startswith(names.left_out):
            continue
        key = in_class(name, names)
        if key in said:
            raise DataError(f"{where} holds {said[key]} and {name}, which are the same weight; remove one of them")
        said[key] = name
        found.setdefault(key[0], {})[key[1]] = one
    return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}


def in_class(name: str, names: Names) -> tuple[str, int]:
    """Returns the name that the class has, and which part of it by rows a file's tensor is."""
    for theirs, own in names.renamed:
        name = name.replace(theirs, own)
    for whole, parts in (names.split or {}).items():
        for number, part in enumerate(parts):
            if name.endswith(part):
                return name.removesuffix(part) + whole, number
    return name, 0


def rows_shape(pieces: Sequence[Located]) -> tuple[int, ...] | None:
    """Returns the shape of what these tensors make, one below the other; None where they do not fit together."""
    first = pieces[0][1]
    shapes = [chunk.shape for _, chunk in pieces]
    if len(pieces) == 1:
        return first.shape
    fits = all(shape[1:] == first.shape[1:] and chunk.dtype == first.dtype for shape, (_, chunk) in zip(shapes, pieces))
    return (sum(shape[0] for shape in shapes), *first.shape[1:]) if fits else None


def cut_out(pieces: Sequence[Located], name: str, shape: tuple[int, ...], first: int) -> list[Located]:
    """Returns where a parameter ``name`` lies that begins at number ``first`` of what the ``pieces`` make."""
    found, begin, size = [], 0, math.prod(shape)
    for path, chunk in pieces:
        count = math.prod(chunk.shape)
        low, high = max(first, begin), min(first + size, begin + count)
        width = DTYPES[chunk.dtype].itemsize
        for start, (offsets, sizes) in _boxes(shape, low - first, high - first):
            at = chunk.start + (first + start - begin) * width
            found.append((path, Chunk(name, chunk.dtype, shape, offsets, sizes, at, math.prod(sizes) * width)))
        begin += count
    return found


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Cuts the numbers ``[start, stop)`` of a tensor, in their order, into boxes; each with its first number."""
    if start >= stop:
        return
    if not shape:
        yield start, ((), ())
        return
    inner = math.prod(shape[1:])
    row, last = start // inner, stop // inner
    if row * inner < start or row == last:
        end = min(stop, (row + 1) * inner)
        yield from _inside(shape, row, start, end)
        start = end
        row += 1
    if row < last:
        yield row * inner, ((row, *(0 for _ in shape[1:])), (last - row, *shape[1:]))
        start = last * inner
    if start < stop:
        yield from _inside(shape, last, start, stop)


def _inside(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    inner = math.prod(shape[1:])
    for first, (offsets, sizes) in _boxes(shape[1:], start - row * inner, stop - row * inner):
        yield row * inner + first, ((row, *offsets), (1, *sizes))
