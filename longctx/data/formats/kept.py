"""Keeps offsets that take long to find, in the folder of what was found earlier.

They lie in a file of their own, and the verdict about the files that they were found in holds the SHA-256. So a file
that is damaged, or of another time, counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longctx.data.corpus import Int64
from longctx.data.formats.numbers import BLOCK, Numbers, numbers_in
from longctx.data.formats.raw import RawFile
from longctx.data.source import Report
from longctx.data.verdicts import Stamp, remembered, verdict_name
from longctx.errors import DataError


def kept_offsets(
    folder: Path | None, check: str, stamps: list[Stamp], find: Callable[[Report], Int64], progress: Report
) -> Int64:
    """Returns the offsets that ``find`` finds in the files with these stamps, from the folder where they are known."""
    if folder is None:
        return find(progress)
    place = folder / "offsets" / f"{verdict_name(check, stamps)}.i64"
    fresh: list[Int64] = []

    def keep(report: Report) -> dict[str, Any]:
        fresh.append(find(report))
        return {"sha256": _write(place, fresh[-1])}

    found = remembered(folder, check, stamps, keep, progress)
    kept = None if fresh else _read(place, found.get("sha256"))
    return fresh[-1] if fresh else find(progress) if kept is None else kept


def _write(place: Path, offsets: Int64) -> str:
    """Writes the offsets, where that can be done, and returns their SHA-256."""
    digest = hashlib.sha256()
    unfinished = place.with_name(f".{place.name}.{os.uname().nodename}.{os.getpid()}")
    parts = [offsets[first : first + BLOCK].astype("<i8", copy=False) for first in range(0, len(offsets), BLOCK)]
    for part in parts:
        digest.update(part.data)
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                for part in parts:
                    file.write(part.data)
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)
    return digest.hexdigest()


def _read(place: Path, wanted: Any) -> Int64 | None:
    """Returns the offsets of a file if they have the SHA-256 that is wanted, else None."""
    digest, numbers = hashlib.sha256(), Numbers()
    try:
        file = RawFile(place)
        for _, part in numbers_in(file, 0, file.size // 8, "<i8"):
            digest.update(part.data)
            numbers.extend(part)
    except DataError:
        return None
    found = numbers.done()
    return found if digest.hexdigest() == wanted and len(found) and not file.size % 8 else None
