"""Keeps a token file that is being written, such that a process that was killed at any point can be followed up.

Beside ``X.bin`` lie, hidden until the end: the tokens, a length for each document, and a note of how much of both is on
disk and where the reading of the corpus stands. The note is replaced in one step, after what it speaks of was synced.
So what lies behind it is cut off and made again. At the end three files get their names; the note says so before the
first does, and a follow-up only finishes the renaming.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longctx.data.corpus import CHUNK
from longctx.data.files import printable
from longctx.data.source import Report
from longctx.data.tokenizing.frames import Encoded
from longctx.data.tokenizing.summary import SUMMARY, histogram
from longctx.data.tokenizing.units import Position, Unit
from longctx.data.tokens import DTYPES, HEADER, MAGIC
from longctx.errors import ConfigError, StorageError

_log = logging.getLogger(__name__)

COMMIT_SECONDS = 5.0  # of work that a kill costs at most, besides reading the current file again
_MIB = 1 << 20


@dataclass(frozen=True)
class TokensWritten:
    """Says what is on disk. ``key``: names what is made of what; ``sha256``: of the tokens so far."""

    key: str
    position: Position = field(default_factory=Position)
    documents: int = 0
    empty: int = 0
    emptied: int = 0
    tokens: int = 0
    text_bytes: int = 0
    unknown: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    finished: bool = False


class PartialFiles:
    """Names the files of a token file, finished and not."""

    def __init__(self, out: Path) -> None:
        if out.suffix != ".bin":
            nearest = out.with_suffix(".bin") if out.suffix == ".idx" else out.with_name(f"{out.name}.bin")
            raise ConfigError(
                f"{printable(out)}: a token file ends in .bin, its boundaries in .idx; nearest: {printable(nearest)}"
            )
        self.bin, self.idx = out, out.with_suffix(".idx")
        self.summary = out.with_suffix(SUMMARY)
        self.finished = (self.bin, self.idx, self.summary)
        self.note = out.with_name(f".{out.name}.unfinished")
        self.lengths = out.with_name(f".{out.name}.lengths")
        self.lock = out.with_name(f".{out.name}.lock")

    def hidden(self, path: Path) -> Path:
        """Returns the name of a file before it is finished."""
        return path.with_name(f".{path.name}.new")


@contextmanager
def claimed(names: PartialFiles, waiting: Report | None = None) -> Iterator[None]:
    """Lets one process at a time write a token file.

    Waits while another does, and tells ``waiting`` so; None: raises ``StorageError``.
    """
    with writing(names.bin):
        names.bin.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(names, waiting)
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                names.lock.unlink()
        finally:
            os.close(descriptor)


def _locked(names: PartialFiles, waiting: Report | None) -> int:
    where = printable(names.bin)
    while True:
        descriptor = os.open(names.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file, and its name may be another one's by now.
            if os.path.samestat(os.fstat(descriptor), names.lock.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if waiting is None:
                os.close(descriptor)
                raise StorageError(f"{where} is being written by another process; wait for its end") from None
            waiting(0, 0, "another process tokenizes the same text")
            time.sleep(0.1)
        except OSError:
            _log.warning("%s lies on a file system without locks: nothing keeps a second writer out", where)
            return descriptor
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's errors into a ``StorageError`` that names the file and says that nothing is lost."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror or error}; the same command goes on from where it was"
        ) from error


def read_note(names: PartialFiles) -> TokensWritten | None:
    """Returns what an earlier process has noted; None where there is nothing that can be trusted."""
    try:
        found = json.loads(names.note.read_text(encoding="utf-8"))
        return TokensWritten(**{**found, "position": Position(**found["position"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class PartialFile:
    """Appends documents to an unfinished token file, after those that ``start`` says are there."""

    def __init__(self, names: PartialFiles, dtype: str, start: TokensWritten, progress: Report) -> None:
        self._names, self._dtype, self._kind = names, dtype, DTYPES[dtype]
        with writing(names.bin):
            self._bin = _cut(names.hidden(names.bin), start.tokens * self._kind.itemsize)
            self._lengths = _cut(names.lengths, start.documents * 8)
            self._digest = _hashed(self._bin, progress)
        if self._digest.hexdigest() != start.sha256:
            _log.warning("%s: what an earlier process left is damaged; it is made again", printable(names.bin))
            start = TokensWritten(start.key)
            with writing(names.bin):
                self.close()
                self._bin, self._lengths = _cut(names.hidden(names.bin), 0), _cut(names.lengths, 0)
            self._digest = hashlib.sha256()
        self.written = start
        self._committed = time.monotonic()

    def close(self) -> None:
        """Closes the files; what was written since the last note counts for nothing."""
        for file in (self._bin, self._lengths):
            with suppress(OSError):
                file.close()

    def add(self, unit: Unit, encoded: Encoded) -> None:
        """Appends the documents of a batch."""
        ids = encoded.ids.astype(self._kind, copy=False)
        with writing(self._names.bin):
            self._bin.write(ids.data)
            self._lengths.write(encoded.lengths.astype("<i8", copy=False).data)
        self._digest.update(ids.data)
        had = np.array([len(content) for content in unit.contents], dtype=np.int64)
        before = self.written
        self.written = replace(
            before,
            position=unit.end,
            documents=before.documents + len(had),
            empty=before.empty + int(np.count_nonzero(had == 0)),
            emptied=before.emptied + int(np.count_nonzero((had > 0) & (encoded.lengths == 0))),
            tokens=before.tokens + len(ids),
            text_bytes=before.text_bytes + int(had.sum()),
            unknown=before.unknown + encoded.unknown,
        )
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self, finished: bool = False) -> None:
        """Puts on disk what was appended, then the note of it."""
        self.written = replace(self.written, sha256=self._digest.copy().hexdigest(), finished=finished)
        with writing(self._names.bin):
            for file in (self._bin, self._lengths):
                _sync(file)
            replace_file(self._names.note, json.dumps(asdict(self.written)))
        self._committed = time.monotonic()

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Gives the file its name, and returns its summary; ``facts``: what it says beside the counts."""
        names = self._names
        self.commit()
        with writing(names.bin):
            found = np.memmap(names.lengths, dtype="<i8", mode="r") if self.written.documents else np.empty(0, "<i8")
            digest = self._write_index(found)
            written = self.written
            summary = {
                "key": written.key,
                "sha256": digest,
                "dtype": self._dtype,
                "documents": written.documents,
                "empty_documents": written.empty,
                "emptied_documents": written.emptied,
                "tokens": written.tokens,
                "text_bytes": written.text_bytes,
                "unknown_tokens": written.unknown,
                "lengths": {"longest": int(found.max(initial=0)), "histogram": histogram(found)},
                **facts,
            }
            replace_file(names.hidden(names.summary), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            self.commit(finished=True)
        self.close()
        finish_renaming(names)
        return summary

    def _write_index(self, lengths: Any) -> str:
        """Writes the boundaries, and returns the SHA-256 that stands in their header."""
        names, digest, place = self._names, self._digest.copy(), 0
        with names.hidden(names.idx).open("wb") as file:
            file.write(bytes(HEADER.size) + bytes(8))
            digest.update(bytes(8))
            for start in range(0, len(lengths), CHUNK):
                ends = place + np.cumsum(lengths[start : start + CHUNK], dtype="<i8")
                place = int(ends[-1])
                file.write(ends.data)
                digest.update(ends.data)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, self._kind.itemsize, 0, len(lengths), digest.digest()))
            _sync(file)
        return digest.hexdigest()


def finish_renaming(names: PartialFiles) -> None:
    """Gives all files their names, those that have them already left as they are."""
    with writing(names.bin):
        for path in names.finished:
            if names.hidden(path).exists():
                names.hidden(path).replace(path)
        names.lengths.unlink(missing_ok=True)
        names.note.unlink(missing_ok=True)


def discard(names: PartialFiles) -> None:
    """Removes what an earlier process left of another corpus or tokenizer."""
    with writing(names.bin):
        names.note.unlink(missing_ok=True)
        for path in (names.lengths, *map(names.hidden, names.finished)):
            path.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Writes a small file in one step, on disk."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(text.encode("utf-8"))
        _sync(file)
    unfinished.replace(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _cut(path: Path, size: int) -> BinaryIO:
    """Opens a file for appending, cut to a size; a shorter one stays as it is, and its hash will tell."""
    file = path.open("a+b")
    if file.seek(0, os.SEEK_END) > size:
        file.truncate(size)
    file.seek(0)
    return file


def _hashed(file: BinaryIO, progress: Report) -> hashlib._Hash:
    digest, done = hashlib.sha256(), 0
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    while block := file.read(4 * _MIB):
        digest.update(block)
        done += len(block)
        progress(done // _MIB, -(-total // _MIB), "MiB of an earlier process's tokens checked")
    return digest
