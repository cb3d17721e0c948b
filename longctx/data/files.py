"""Opens and reads files; whatever goes wrong is one typed error that names the file."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from longctx.errors import ConfigError, DataError, NotAvailableError

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


def data_path(path: str | None, source: str) -> Path:
    """Returns ``data.path`` as a path.

    Raises ``ConfigError`` when it is not set, ``DataError`` when nothing readable is there.
    """
    if not path:
        raise ConfigError(
            f"data.path={path!r}: data={source} needs a path; set data.path=..., or choose "
            "data=python_stdlib, which needs none"
        )
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
    """Opens a regular file that ``packing`` (".gz", ".bz2", ".xz") compressed, or that nothing did.

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


TESTERS = {".gz": "gzip -t", ".bz2": "bzip2 -t", ".xz": "xz -t", ".lzma": "xz -t"}


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
        import lzma

        return lzma.LZMAFile(file), (EOFError, lzma.LZMAError)
    except ImportError as error:
        raise NotAvailableError(
            f"this Python cannot read {packing}: {error}; unpack the file, or take a Python that has the module"
        ) from error
