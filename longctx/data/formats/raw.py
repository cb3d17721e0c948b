"""Reads bytes of a file at any place, such that a file that is cut meanwhile is an error and no crash.

A memory map would end the process where a page is gone when it is looked at (SIGBUS). The system is asked instead.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

from longctx.data.files import open_regular, printable, reading
from longctx.data.verdicts import Stamp
from longctx.errors import DataError

_log = logging.getLogger(__name__)

MOST_OPEN = 200  # files that are held open at a time: a process may have 1,024, and a corpus more shards


class RawFile:
    """Holds a file of bytes. ``stamp``: the file as it was opened.

    It is held open, so that it stays the same one even if its name is given to another. Of more files than a process
    may hold, those opened first are closed and opened again when they are read; one that was replaced is refused then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = False
        self._descriptor: _Descriptor | None = None
        with open_regular(path) as file:
            self.stamp = Stamp.of(path, file.fileno())
            self._hold(os.dup(file.fileno()))

    @property
    def size(self) -> int:
        """Bytes that the file had when it was opened."""
        return self.stamp.size

    def read(self, start: int, size: int) -> bytes:
        """Reads ``size`` bytes from byte ``start`` on. Raises ``DataError`` where the file no longer has them."""
        held = self._descriptor or self._opened_again()
        parts: list[bytes] = []
        missing = size
        while missing:
            with reading(self.path):
                part = os.pread(held.number, missing, start + size - missing)
            if not part:
                raise DataError(
                    f"{printable(self.path)} ends at byte {start + size - missing}, and had {self.size} bytes "
                    "when it was opened: it was cut while the run reads it; restore it and go on with --resume"
                )
            parts.append(part)
            missing -= len(part)
        self._tell_of_changes(held)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stream(self) -> io.BufferedReader:
        """Returns the whole of it as a file that is read from its beginning, with a place of its own."""
        return io.BufferedReader(_Stream(self), 1 << 20)

    def mapped(self) -> mmap.mmap:
        """Maps the file into memory, read-only; it must hold something."""
        held = self._descriptor or self._opened_again()
        return mmap.mmap(held.number, self.size, access=mmap.ACCESS_READ)

    def _hold(self, descriptor: int) -> _Descriptor:
        held = self._descriptor = _Descriptor(descriptor)
        with _lock:
            _opened.append(weakref.ref(self))
            while len(_opened) > MOST_OPEN:
                first = _opened.popleft()()
                if first is not None:
                    first._descriptor = None  # closed once no thread reads from it any more
        return held

    def _opened_again(self) -> _Descriptor:
        with open_regular(self.path) as file:
            now = Stamp.of(self.path, file.fileno())
            if (now.inode, now.device, now.size) != (self.stamp.inode, self.stamp.device, self.stamp.size):
                raise DataError(
                    f"{printable(self.path)} was replaced while the run reads it: {now.size} bytes, it had "
                    f"{self.size} when it was opened; restore it and go on with --resume"
                )
            return self._hold(os.dup(file.fileno()))

    def _tell_of_changes(self, held: _Descriptor) -> None:
        """Says once that the file is being written to: from then on, what is read is not what was checked."""
        if self._told:
            return
        now = os.fstat(held.number)
        if (now.st_mtime_ns, now.st_size) != (self.stamp.modified, self.stamp.size):
            self._told = True
            _log.warning(
                "%s was changed while the run reads it: tokens from here on are not those that were checked",
                printable(self.path),
            )


class _Stream(io.RawIOBase):
    def __init__(self, file: RawFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._file.size - self._place))
        buffer[:size] = self._file.read(self._place, size)
        self._place += size
        return size


class _Descriptor:
    """Closes a file with the last reference to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        weakref.finalize(self, os.close, number)


_opened: deque[weakref.ref[RawFile]] = deque()
_lock = threading.Lock()
