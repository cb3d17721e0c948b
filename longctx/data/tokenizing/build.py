"""Makes a token file of text: read in one process, encoded in several, written in the order of the text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from longctx.data.files import printable, reading
from longctx.data.source import Report, TextFiles, unreported
from longctx.data.tokenizer import Policy, Tokenizer, open_tokenizer
from longctx.data.tokenizing.frames import Encoded
from longctx.data.tokenizing.partial import (
    PartialFile,
    PartialFiles,
    TokensWritten,
    claimed,
    discard,
    finish_renaming,
    read_note,
)
from longctx.data.tokenizing.units import UNIT, Unit, units_of
from longctx.data.tokenizing.workers import EncodingWorkers
from longctx.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

VERSION = 1  # of how text becomes tokens; a new one makes what was left unfinished worthless
AHEAD = 4  # batches for each worker that are read before they are written
AUTO = "auto"
_MIB = 1 << 20


@dataclass(frozen=True)
class Tokenizing:
    """Says what is made of what.

    ``tokenizer``: a path, or None for bytes. ``settings``: what besides the files determines the documents, such as
    the key of their text. ``dtype``: of the tokens, "auto" for the smaller one that holds them.
    """

    texts: TextFiles
    out: Path
    tokenizer: str | None = None
    policy: Policy = field(default_factory=Policy)
    settings: tuple[Any, ...] = ()
    dtype: str = AUTO
    workers: int = 1


def build(
    job: Tokenizing, progress: Report = unreported, waits: bool = False, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, Any], bool]:
    """Writes the token file, and returns its summary, and whether it was there already.

    An earlier process's unfinished work on the same is gone on with; the result is the same to the byte. ``waits``: for
    another process that is at work on it, instead of refusing. ``tokenizer``: the job's, where it is open. Raises
    ``ConfigError`` where something else lies at that place, ``DataError`` naming file and place for bad text,
    ``StorageError`` for a full disk.
    """
    if job.workers < 1:
        raise ConfigError(f"--workers={job.workers}: at least 1 process tokenizes; nearest valid value: 1")
    tokenizer = tokenizer or open_tokenizer(job.tokenizer, job.policy)
    dtype, names = dtype_for(job.dtype, tokenizer), PartialFiles(job.out)
    key = key_of(job, tokenizer, dtype)
    if _is_finished(names, key):
        return _summary_of(names), True
    with claimed(names, progress if waits else None):
        start = _start(names, key)
        if start is None:
            return _summary_of(names), True
        partial = PartialFile(names, dtype, start, progress)
        try:
            notes = _append(job, partial, progress)
            if not partial.written.tokens:
                raise DataError(
                    f"{printable(job.texts.root)}: {partial.written.documents} documents give no token; name text that "
                    "holds something"
                )
            read = {**job.texts.facts, **({"noted": dict(sorted(notes.items()))} if notes else {})}
            facts = {"tokenizer": tokenizer.facts(), "read": {"path": str(job.texts.root), **read}}
            return partial.finish(facts), False
        except DataError:
            partial.close()
            discard(names)  # the same text will fail again, and other text is another file
            raise
        finally:
            partial.close()


def dtype_for(asked: str, tokenizer: Tokenizer) -> str:
    """Returns the dtype that holds a tokenizer's ids. Raises ``ConfigError`` for one that does not."""
    smallest = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    if asked not in (AUTO, "uint16", "uint32"):
        raise ConfigError(f"--dtype={asked}: a token file holds uint16 or uint32; nearest valid value: {smallest}")
    if asked == "uint16" and smallest == "uint32":
        raise ConfigError(
            f"--dtype=uint16 holds ids below 65536, and the tokenizer has {tokenizer.vocab_size}; nearest valid value: "
            "uint32"
        )
    return smallest if asked == AUTO else asked


def key_of(job: Tokenizing, tokenizer: Tokenizer, dtype: str) -> str:
    """Names what is made of what: another file, tokenizer or setting has another name."""
    files = []
    for path in job.texts.paths:
        with reading(path):
            status = path.stat()
        files.append([str(path), status.st_size, status.st_mtime_ns])
    text = json.dumps([VERSION, tokenizer.digest, dtype, job.settings, files])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _start(names: PartialFiles, key: str) -> TokensWritten | None:
    """Returns where to begin; None where nothing is left to do."""
    note = read_note(names)
    if note is not None and note.key == key:
        if not note.finished:
            _log.warning("going on after %d documents that an earlier process has tokenized", note.documents)
            return note
        finish_renaming(names)
    if _is_finished(names, key):
        return None
    there = [path for path in names.finished if path.exists()]
    if there:
        raise ConfigError(
            f"{printable(there[0])} is there already, and was not made of this text as it is now by this tokenizer; "
            "remove it, or choose another --out"
        )
    if note is not None:
        _log.warning("an earlier process's unfinished work is of other text, or of another tokenizer: beginning anew")
    discard(names)
    return TokensWritten(key)


def _is_finished(names: PartialFiles, key: str) -> bool:
    """Tells whether the token file is there, made of the same by the same, with nothing left to rename."""
    whole = all(path.exists() for path in names.finished) and not names.note.exists()
    return whole and _summary_of(names).get("key") == key


def _summary_of(names: PartialFiles) -> dict[str, Any]:
    try:
        found = json.loads(names.summary.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _append(job: Tokenizing, partial: PartialFile, progress: Report) -> Counter[str]:
    """Encodes and appends all that is missing; returns what was noted while reading."""
    sizes = [path.stat().st_size for path in job.texts.paths]
    before, total = [0, *accumulate(sizes)], -(-sum(sizes) // _MIB)
    notes: Counter[str] = Counter()

    def at(file: int, position: int) -> None:
        done = (before[file] + position) // _MIB
        progress(min(done, total), total, f"MiB read, {partial.written.documents:,} documents tokenized")

    units = units_of(job.texts, partial.written.position, notes, at)
    with EncodingWorkers(job.tokenizer, job.policy, job.workers) as workers:
        for unit, encoded in _in_order(units, workers):
            partial.add(unit, encoded)
    return notes


def _in_order(units: Iterator[Unit], workers: EncodingWorkers) -> Iterator[tuple[Unit, Encoded]]:
    """Yields batches with their ids in the order of the text.

    What is on its way is bounded in bytes, so that one document that is longer than that is held alone.
    """
    limit = AHEAD * workers.count * UNIT
    waiting: deque[tuple[Unit, Future[Encoded]]] = deque()
    held = 0
    for unit in units:
        while waiting and held + unit.size > limit:
            done, future = waiting.popleft()
            yield done, future.result()
            held -= done.size
        waiting.append((unit, workers.encode(unit.contents, unit.name)))
        held += unit.size
    while waiting:
        done, future = waiting.popleft()
        yield done, future.result()


def available_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0))
