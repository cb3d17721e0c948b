"""Finds and reads files; whatever goes wrong is one typed error that names the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from longctx.errors import ConfigError, DataError

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


def read_bytes(path: Path) -> bytes:
    """Reads the whole content of a regular file."""
    with open_regular(path) as file:
        return file.read()


def find_files(root: Path, excluded: Set[str] = frozenset(), follow: bool = False) -> list[Path]:
    """Finds every file below ``root`` in a fixed order; hidden ones and folders named in ``excluded`` are left out.

    Links to folders are never entered. Links to files are left out too unless ``follow``: they could lead out of the
    folder. One that stays inside would deliver its document twice.
    """

    def refuse(error: OSError) -> None:
        with reading(error.filename or root):
            raise error

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if follow or not path.is_symlink()]
    return sorted(found, key=lambda path: path.parts)
