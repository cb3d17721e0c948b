"""Keeps offsets and ids that take long to find, in the folder of what was found earlier.

They lie in files of their own, and the verdict about the files that they were found in holds the SHA-256. So a file
that is damaged, or of another time, counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from longctx.data.corpus import Int64
from longctx.data.files import printable
from longctx.data.formats.joined import TokenShard
from longctx.data.formats.numbers import BLOCK, Numbers, numbers_in
from longctx.data.formats.raw import RawFile
from longctx.data.source import Report
from longctx.data.tokens import open_pair, write_tokens
from longctx.data.verdicts import Stamp, put, remembered, verdict_name
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
    parts = [offsets[first : first + BLOCK].astype("<i8", copy=False) for first in range(0, len(offsets), BLOCK)]
    for part in parts:
        digest.update(part.data)
    put(place, (part.data for part in parts))
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


def kept_tokens(
    folder: Path | None, check: str, stamp: Stamp, find: Callable[[Report], Iterable[Any]], progress: Report
) -> TokenShard:
    """Returns the documents that ``find`` yields of a file with this stamp, from a token file that is made once.

    Without a folder that can be written it lies in a temporary one, until the corpus goes. Messages name the file that
    the ids are from, and its rows.
    """
    named = printable(Path(stamp.path))
    place = _place_for(folder, f"{verdict_name(check, [stamp])}.bin")
    if folder is not None and place is not None:
        where = place

        def keep(report: Report) -> dict[str, Any]:
            write_tokens(where, find(report), "uint32")
            return {"sha256": open_pair(where, "uint32").recorded}

        shard = _kept(place, remembered(folder, check, [stamp], keep, progress).get("sha256"))
        if shard is None:
            keep(progress)
            shard = open_pair(place, "uint32")
        return replace(shard, unit="row", named=named)
    temporary = tempfile.TemporaryDirectory(prefix="longctx-")
    path = Path(temporary.name) / "ids.bin"
    write_tokens(path, find(progress), "uint32")
    shard = replace(open_pair(path, "uint32"), unit="row", named=named)
    weakref.finalize(shard.file, temporary.cleanup)
    return shard


def _place_for(folder: Path | None, name: str) -> Path | None:
    """Returns where a token file is kept; None where nothing can be."""
    if folder is None:
        return None
    place = folder / "tokens"
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place / name if place.is_dir() and os.access(place, os.W_OK) else None


def _kept(place: Path, wanted: Any) -> TokenShard | None:
    """Returns a token file that was made earlier, if it is the one that is wanted."""
    try:
        shard = open_pair(place, "uint32")
    except DataError:
        return None
    return shard if shard.recorded == wanted else None
