"""Holds where documents begin and end, in memory or, where there are many, in a file that has no name.

The file is ours alone, so a map of it never loses a page, as a map of somebody's index may.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longctx.data.corpus import Int64
from longctx.data.formats.raw import RawFile
from longctx.errors import DataError, StorageError

MOST_IN_MEMORY = 1 << 21  # numbers: 16 MiB
BLOCK = 1 << 20  # numbers looked at in one go


class Numbers:
    """Collects int64 numbers, in the order they come."""

    def __init__(self) -> None:
        self._parts: list[Int64] = []
        self._held = 0
        self._file: Any = None

    def extend(self, part: NDArray[Any]) -> None:
        """Adds a row of numbers. Raises ``StorageError`` where the disk is full."""
        self._parts.append(np.ascontiguousarray(part, dtype=np.int64))
        self._held += len(part)
        if self._held > MOST_IN_MEMORY:
            self._spill()

    def done(self) -> Int64:
        """Returns all of them, read-only."""
        if self._file is None:
            whole = np.concatenate([np.empty(0, dtype=np.int64), *self._parts])
            whole.flags.writeable = False
            return whole
        self._spill()
        with self._file as file:
            file.flush()
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.int64)

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="longctx-")  # noqa: SIM115 - it lives as long as the map
            for part in self._parts:
                self._file.write(part.data)
        except OSError as error:
            raise StorageError(
                f"cannot write the boundaries of documents to {tempfile.gettempdir()}: {error.strerror or error}; "
                "TMPDIR names another place"
            ) from error
        self._parts, self._held = [], 0


def numbers_in(file: RawFile, start: int, count: int, kind: str) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yields ``count`` numbers that lie from byte ``start`` on, a block at a time, with the number of each's first."""
    dtype = np.dtype(kind)
    for first in range(0, count, BLOCK):
        rows = min(BLOCK, count - first)
        raw = file.read(start + first * dtype.itemsize, rows * dtype.itemsize)
        yield first, np.frombuffer(raw, dtype=dtype)


def blocks(numbers: Int64) -> Iterator[tuple[int, Int64]]:
    """Yields a row of numbers in blocks that overlap by one, with the place of each's first."""
    for first in range(0, len(numbers) - 1, BLOCK):
        yield first, numbers[first : first + BLOCK + 1]


class Rising:
    """Collects offsets behind a first 0, none smaller than the one before.

    ``where``: the file they stand in. ``word``: what they divide it into. ``at(i)``: names the place of the i-th.
    """

    def __init__(self, where: str, word: str, at: Callable[[int], str]) -> None:
        self._where, self._word, self._at = where, word, at
        self._last, self._count = 0, 0
        self._numbers = Numbers()
        self._numbers.extend(np.zeros(1, dtype=np.int64))

    def extend(self, part: NDArray[Any]) -> None:
        """Takes the next offsets. Raises ``DataError`` naming the first that is smaller than the one before."""
        whole = np.concatenate([[self._last], part.astype(np.int64, copy=False)])
        falling = whole[1:] < whole[:-1]
        if falling.any():
            first = int(np.argmax(falling))
            raise DataError(
                f"{self._where}: {self._word} {self._count + first} runs from {int(whole[first])} to "
                f"{int(whole[first + 1])} ({self._at(self._count + first)}); offsets must not decrease"
            )
        self._numbers.extend(whole[1:])
        self._last, self._count = int(whole[-1]), self._count + len(part)

    def done(self) -> Int64:
        """Returns the offsets."""
        return self._numbers.done()
