"""Reads rows of tokens from a file of raw numbers, such that a file that is cut meanwhile is an error and no crash."""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.corpus import Tokens
from longctx.data.files import open_regular, printable, reading
from longctx.data.verdicts import Stamp
from longctx.errors import DataError

_log = logging.getLogger(__name__)


class TokenFile:
    """Holds a file of tokens open.

    ``tokens`` maps it into memory: a page that is gone when it is looked at ends the process (SIGBUS). ``read`` asks
    the system for the bytes instead, which costs a copy, and raises. ``stamp``: the file as it was opened.
    """

    def __init__(self, path: Path, kind: np.dtype[Any]) -> None:
        self.path = path
        self.kind = kind
        with open_regular(path) as file:
            # A descriptor of its own: the file that is open stays the same one, even if its name is given to another.
            self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
            self.stamp = Stamp.of(path, self._descriptor)
            size = self.stamp.size
            if size % kind.itemsize:
                raise DataError(
                    f"{printable(path)}: {size} bytes is not a multiple of the {kind.itemsize} bytes of a token; "
                    "the file is truncated, or data.token_dtype is wrong"
                )
            # A plain view of the map: slices of np.memmap itself cost a Python call each. An empty file has no map.
            self.tokens: Tokens = np.asarray(np.memmap(file, dtype=kind, mode="r")) if size else np.empty(0, dtype=kind)
        self._told = False

    def __len__(self) -> int:
        """Returns how many tokens the file had when it was opened."""
        return self.stamp.size // self.kind.itemsize

    def read(self, start: int, stop: int) -> Tokens:
        """Reads tokens ``start`` to ``stop``. Raises ``DataError`` where the file no longer has them."""
        size, place = (stop - start) * self.kind.itemsize, start * self.kind.itemsize
        parts: list[bytes] = []
        missing = size
        while missing:
            with reading(self.path):
                part = os.pread(self._descriptor, missing, place + size - missing)
            if not part:
                raise DataError(
                    f"{printable(self.path)} ends at byte {place + size - missing}, and had {self.stamp.size} bytes "
                    "when it was opened: it was cut while the run reads it; restore it and go on with --resume"
                )
            parts.append(part)
            missing -= len(part)
        self._tell_of_changes()
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=self.kind)

    def _tell_of_changes(self) -> None:
        """Says once that the file is being written to: from then on, what is read is not what was checked."""
        if self._told:
            return
        now = os.fstat(self._descriptor)
        if (now.st_mtime_ns, now.st_size) != (self.stamp.modified, self.stamp.size):
            self._told = True
            _log.warning(
                "%s was changed while the run reads it: tokens from here on are not those that were checked",
                printable(self.path),
            )
