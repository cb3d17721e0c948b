"""Opens and reads files; whatever goes wrong is one typed error that names the file."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from longctx.errors import ConfigError, DataError, NotAvailableError
from longctx.rules import redacted

ZSTD_BLOCK = 1 << 11  # packed bytes unpacked in one go: at most 64 MiB come of them
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
EXCERPT = 60  # characters of bad input that a message shows


def printable(text: str | Path) -> str:
    """Returns ``text`` for a message: as it is when it prints on one line, else escaped."""
    plain = str(text)
    return plain if plain.isprintable() else ascii(plain)


def excerpt(found: Any) -> str:
    """Returns the beginning of bad input for a message, escaped."""
    if isinstance(found, (str, bytes)) and len(found) > EXCERPT:
        return f"{found[:EXCERPT]!a}..."
    whole = ascii(found)
    return whole if len(whole) <= 2 * EXCERPT else f"{whole[:EXCERPT]}..."


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns the system's errors about ``path`` into a ``DataError`` that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with NUL or a lone surrogate
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot read {printable(path)}: {reason}; it must exist and be readable") from error


def local_path(path: str | None) -> str | None:
    """Returns a path of this machine for one that is written as an address. Raises ``ConfigError`` for others."""
    found = _ADDRESS.match(path or "")
    if path is None or found is None:
        return path
    if found[1].lower() == "file" and found[2] in ("", "localhost"):
        return unquote(found[3])
    raise ConfigError(
        f"data.path={printable(redacted(path))}: addresses of {found[1]}:// are not read; nearest valid choice: mount "
        "or copy what it names, and set data.path to that"
    )


def data_path(path: str | None, source: str) -> Path:
    """Returns ``data.path`` as a path.

    Raises ``ConfigError`` when it is not set, ``DataError`` when nothing readable is there.
    """
    if not path:
        raise ConfigError(
            f"data.path={path!r}: data={source} needs a path; set data.path=..., or choose "
            "data=python_stdlib, which needs none"
        )
    path = str(local_path(path))
    with reading(path):
        Path(path).stat()
    return Path(path)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading bytes; a pipe or device, which could block forever, is refused."""
    with reading(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{printable(path)} is not a regular file; data must be files, not pipes or devices")
        with path.open("rb") as file:
            yield file


@contextmanager
def open_unpacked(path: Path, packing: str = "") -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Opens a regular file that ``packing`` (".gz", ".bz2", ".xz", ".zst") compressed, or that nothing did.

    Yields the bytes as they were before, and how many of the file have been read. A file that is cut or damaged
    raises ``DataError`` where that is noticed.
    """
    with open_regular(path) as file:
        if not packing:
            yield file, file.tell
            return
        unpacked, failures = _unpacker(packing, file)
        try:
            with io.BufferedReader(cast(Any, unpacked), 1 << 20) as buffered:
                yield cast(BinaryIO, buffered), file.tell
        except failures as error:
            raise DataError(
                f"{printable(path)}: the compressed content is damaged or cut: {error}; copy the file again, or test "
                f"it with `{TESTERS[packing]}`"
            ) from error


TESTERS = {
    ".gz": "gzip -t",
    ".bz2": "bzip2 -t",
    ".xz": "xz -t",
    ".lzma": "xz -t",
    ".zst": "zstd -t",
    ".zstd": "zstd -t",
}


def _unpacker(packing: str, file: BinaryIO) -> tuple[Any, tuple[type[Exception], ...]]:
    """Returns the reader of a compressed file, and what it raises for damage."""
    # Imported here: a Python can be built without one of them, and most corpora need none.
    try:
        if packing == ".gz":
            import gzip
            import zlib

            return gzip.GzipFile(fileobj=file, mode="rb"), (EOFError, gzip.BadGzipFile, zlib.error)
        if packing == ".bz2":
            import bz2

            return bz2.BZ2File(file), (EOFError, OSError)
        if packing in (".zst", ".zstd"):
            import zstandard

            return ZstdFile(file, zstandard), (EOFError, zstandard.ZstdError)
        import lzma

        return lzma.LZMAFile(file), (EOFError, lzma.LZMAError)
    except ImportError as error:
        way = "install longctx[formats]" if packing.startswith(".zst") else "take a Python that has the module"
        raise NotAvailableError(f"this Python cannot read {packing}: {error}; unpack the file, or {way}") from error


class ZstdFile(io.RawIOBase):
    """Unpacks what Zstandard packed, frame after frame. Raises ``EOFError`` where the last one is cut.

    The library's own reader takes a frame that is cut for one that has ended. A frame that needs more than 128 MiB of
    memory (``zstd --long=28`` and above) is refused by the library.
    """

    def __init__(self, file: BinaryIO, library: Any) -> None:
        self._file, self._library = file, library
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpacks the next bytes."""
        while not self._unpacked:
            self._packed = self._packed or self._file.read(ZSTD_BLOCK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size
