"""Reads rows of tokens from a file of raw numbers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.corpus import Tokens
from longctx.data.files import printable
from longctx.data.formats.raw import RawFile
from longctx.data.verdicts import Stamp
from longctx.errors import DataError


class TokenFile:
    """Holds a file of tokens open.

    ``read`` copies, and raises where the file was cut meanwhile. ``stamp``: the file as it was opened. ``says``: what
    states how many bytes a token has, for messages.
    """

    def __init__(self, path: Path, kind: np.dtype[Any], says: str = "data.token_dtype") -> None:
        self.path = path
        self.kind = kind
        self._raw = RawFile(path)
        if self._raw.size % kind.itemsize:
            raise DataError(
                f"{printable(path)}: {self._raw.size} bytes is not a multiple of the {kind.itemsize} bytes of a token; "
                f"the file is truncated, or {says} is wrong"
            )

    @property
    def stamp(self) -> Stamp:
        return self._raw.stamp

    @cached_property
    def tokens(self) -> Tokens:
        """The file mapped into memory: a page that is gone when it is looked at ends the process (SIGBUS)."""
        if not len(self):
            return np.empty(0, dtype=self.kind)  # an empty file has no map
        # A plain view of the map: slices of np.memmap itself cost a Python call each.
        return np.frombuffer(self._raw.mapped(), dtype=self.kind)

    def __len__(self) -> int:
        """Returns how many tokens the file had when it was opened."""
        return self.stamp.size // self.kind.itemsize

    def read(self, start: int, stop: int) -> Tokens:
        """Reads tokens ``start`` to ``stop``. Raises ``DataError`` where the file no longer has them."""
        size = self.kind.itemsize
        return np.frombuffer(self._raw.read(start * size, (stop - start) * size), dtype=self.kind)
