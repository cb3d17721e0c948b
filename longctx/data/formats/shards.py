"""Finds the files of a corpus: one, all of a folder, or those that fit a pattern, in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from longctx.config import DataConfig
from longctx.data.files import data_path, printable, reading
from longctx.data.folders import find_files
from longctx.data.source import Check
from longctx.errors import ConfigError, DataError

_MAGIC = re.compile(r"[*?\[]")


def find_shards(path: str | None, source: str, ends: Sequence[str], rule: str, files: str | None = None) -> list[Path]:
    """Returns the files that ``data.path`` names, in the order of their names' parts.

    ``ends``: how they end. ``rule``: says so, for messages. ``files``: ``data.files``, for those of a folder. Nested
    folders are read, hidden names are not, a file with several names counts once.

    Raises ``ConfigError`` for a file with another ending, ``DataError`` where there is none.
    """
    if path and is_pattern(path):
        return _fitting(path, source, ends, rule)
    place = data_path(path, source)
    if not place.is_dir():
        if not place.name.lower().endswith(tuple(ends)):
            raise ConfigError(f"data.path={printable(place)}: {rule}")
        return [place]
    found = [one for one in find_files(place).paths if one.name.lower().endswith(tuple(ends))]
    if not found:
        raise DataError(f"the folder {printable(place)} holds no {' or '.join(ends)} file for data={source}; {rule}")
    chosen = [one for one in found if not files or fits(one.relative_to(place).as_posix(), files)]
    if not chosen:
        raise DataError(
            f"data.files={printable(str(files))} fits none of the {len(found)} files of {printable(place)}, such as "
            f"{printable(found[0].relative_to(place))}"
        )
    return chosen


def is_pattern(path: str) -> bool:
    """Tells whether a path is a pattern: it has one of ``*?[`` and names nothing as it stands."""
    with reading(path):
        return _MAGIC.search(path) is not None and not Path(path).exists()


def fits(name: str, patterns: str) -> bool:
    """Tells whether a path below a folder, or its last part, fits one of the patterns between spaces."""
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, one) or fnmatchcase(last, one) for one in patterns.split())


def _fitting(path: str, source: str, ends: Sequence[str], rule: str) -> list[Path]:
    parts = Path(path).parts
    plain = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    base = Path(*parts[:plain])
    with reading(path):
        base.stat()
    below = [one for one in find_files(base).paths if _match(one.relative_to(base).parts, parts[plain:])]
    found = [one for one in below if one.name.lower().endswith(tuple(ends))]
    if not found:
        other = f"; it fits {printable(below[0])} and others, but {rule}" if below else ""
        raise DataError(f"data.path={printable(path)}: no file for data={source} fits the pattern{other}")
    return found


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Tells whether the parts of a path fit those of a pattern; ``**`` stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _match(parts, patterns[1:]) or (bool(parts) and _match(parts[1:], patterns))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])


def asked(config: DataConfig, check: Check) -> Check:
    """Returns how ids are checked: with ``data.recheck`` from nobody's memory."""
    return replace(check, cache=None) if config.recheck else check
