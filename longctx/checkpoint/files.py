"""Writes one file of a checkpoint once and durably, hashes it on the way, and reads it by byte ranges.

Symbolic links are never followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longctx.errors import StorageError

_BLOCK = 4 << 20  # bytes per read or write call


@dataclass(frozen=True)
class FileRecord:
    """States what a file must be: SHA-256 in hexadecimal and length in bytes."""

    sha256: str
    bytes: int


@contextlib.contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a ``StorageError`` that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{doing} {path}: {error.strerror or error}") from error


def write_new(path: Path, blocks: Iterable[bytes | memoryview], mode: int = 0o600) -> FileRecord:
    """Writes and fsyncs a file that must not exist; its hash is taken from memory, before it is on disk."""
    digest, size = hashlib.sha256(), 0
    with storage_errors("cannot write", path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, mode)
        try:
            for block in blocks:
                view = memoryview(block).cast("B")
                digest.update(view)
                size += len(view)
                while view:
                    view = view[os.write(handle, view[:_BLOCK]) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    return FileRecord(digest.hexdigest(), size)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    with storage_errors("cannot sync", path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Opens a regular file for reading, not through a symbolic link, and yields its descriptor."""
    with storage_errors("cannot read", path):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise StorageError(f"cannot read {path}: not a regular file")
            yield handle
        finally:
            os.close(handle)


def read_range(handle: int, start: int, size: int, path: Path) -> bytearray:
    """Reads exactly ``size`` bytes from offset ``start``."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    with storage_errors("cannot read", path):
        while done < size:
            count = os.preadv(handle, [view[done : done + _BLOCK]], start + done)
            if count == 0:
                raise StorageError(f"{path} is truncated: it ends before byte {start + size}")
            done += count
    return data


def read_small(path: Path, limit: int) -> bytes:
    """Reads a whole file of at most ``limit`` bytes."""
    with opened(path) as handle:
        size = os.fstat(handle).st_size
        if size > limit:
            raise StorageError(f"{path} is damaged: {size} bytes, expected at most {limit}")
        return bytes(read_range(handle, 0, size, path))


def check_size(path: Path, size: int, expected: FileRecord) -> None:
    """Raises ``StorageError`` unless ``size`` is that of what was written."""
    if size != expected.bytes:
        raise StorageError(f"{path} is damaged: {size} bytes, {expected.bytes} were written")


def check_file(path: Path, expected: FileRecord) -> None:
    """Raises ``StorageError`` unless the file is byte for byte what was written."""
    with opened(path) as handle:
        size = os.fstat(handle).st_size
        check_size(path, size, expected)
        digest = hashlib.sha256()
        for start in range(0, size, _BLOCK):
            digest.update(read_range(handle, start, min(_BLOCK, size - start), path))
    if digest.hexdigest() != expected.sha256:
        raise StorageError(f"{path} is damaged: its SHA-256 is not that of what was written")
