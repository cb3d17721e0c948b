"""Files of checkpoints: durable writes, names, one rename that commits, and what a crash may leave behind.

Inside the directory of checkpoints only ``step-N`` counts. Everything else of ours begins with a dot:
``.partial-step-N`` is being written, ``.replaced-step-N`` was committed until a rewound run reached step N
again, ``.trash-X`` is being deleted. Symbolic links are never followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longctx.errors import StorageError

_log = logging.getLogger(__name__)

_STEP = r"step-(0|[1-9][0-9]{0,17})"
_COMMITTED = re.compile(_STEP)
_REPLACED = re.compile(rf"\.replaced-{_STEP}")
_LEFTOVER = re.compile(rf"\.partial-{_STEP}|\.trash-[0-9a-f]{{16}}")
_BLOCK = 4 << 20  # bytes per read or write call


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: SHA-256 in hexadecimal and length."""

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


def write_new(path: Path, blocks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes and fsyncs a file that must not exist; its hash is taken from memory, before it is on disk."""
    digest, size = hashlib.sha256(), 0
    with storage_errors("cannot write", path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, 0o600)
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
    """A descriptor for reading a regular file, not through a symbolic link."""
    with storage_errors("cannot read", path):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise StorageError(f"cannot read {path}: not a regular file")
            yield handle
        finally:
            os.close(handle)


def read_range(handle: int, start: int, size: int, path: Path) -> bytearray:
    """Exactly ``size`` bytes from offset ``start``."""
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
    """A whole file of at most ``limit`` bytes."""
    with opened(path) as handle:
        size = os.fstat(handle).st_size
        if size > limit:
            raise StorageError(f"{path} is damaged: {size} bytes, expected at most {limit}")
        return bytes(read_range(handle, 0, size, path))


def check_file(path: Path, expected: FileRecord) -> None:
    """Raises ``StorageError`` unless the file is byte for byte what was written."""
    with opened(path) as handle:
        size = os.fstat(handle).st_size
        if size != expected.bytes:
            raise StorageError(f"{path} is damaged: {size} bytes, {expected.bytes} were written")
        digest = hashlib.sha256()
        for start in range(0, size, _BLOCK):
            digest.update(read_range(handle, start, min(_BLOCK, size - start), path))
    if digest.hexdigest() != expected.sha256:
        raise StorageError(f"{path} is damaged: its SHA-256 is not that of what was written")


class CheckpointDirectory:
    """The checkpoints of one run. Methods that change anything are for rank 0 alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def steps(self) -> list[int]:
        """Committed steps, ascending. Other names, links and files are ignored."""
        names = self._directories()
        matches = [_COMMITTED.fullmatch(name) or _REPLACED.fullmatch(name) for name in names]
        return sorted({int(match[1]) for match in matches if match})

    def path(self, step: int) -> Path:
        """Where a committed step lies: at its name, or aside when a crash cut its replacement short."""
        final, aside = self.root / f"step-{step}", self.root / f".replaced-step-{step}"
        return aside if aside.is_dir() and not os.path.lexists(final) else final

    def partial(self, step: int) -> Path:
        """Where a step lies while it is written."""
        return self.root / f".partial-step-{step}"

    def begin(self, step: int) -> None:
        """Clears what crashes have left and makes an empty directory for ``step``."""
        with storage_errors("cannot prepare a checkpoint in", self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in self._directories():
                if _LEFTOVER.fullmatch(name):
                    _remove(self.root / name)
                elif match := _REPLACED.fullmatch(name):
                    self._settle(int(match[1]))
            self.partial(step).mkdir(mode=0o700)

    def commit(self, step: int) -> None:
        """Makes the partial directory the checkpoint of ``step``; before the rename, nothing has happened."""
        sync_directory(self.partial(step))
        final, aside = self.root / f"step-{step}", self.root / f".replaced-step-{step}"
        with storage_errors("cannot commit", final):
            if os.path.lexists(final):
                final.rename(aside)
            self.partial(step).rename(final)
        sync_directory(self.root)
        if os.path.lexists(aside):
            self._discard(aside)

    def abandon(self, step: int) -> None:
        """Frees the space of a save that failed, as far as the disk allows."""
        with contextlib.suppress(OSError):
            _remove(self.partial(step))

    def prune(self, keep: int, newest: int, damaged: Collection[int] = ()) -> None:
        """Deletes all but the ``keep`` newest steps up to ``newest`` (0: none); failures are only reported.

        ``damaged`` ones do not count as kept, and go with those below the oldest that does. Later steps belong
        to a future that this run was rewound from; they are the user's to delete.
        """
        committed = self.steps()
        usable = [step for step in committed if step <= newest and step not in damaged]
        oldest = usable[-keep] if 0 < keep <= len(usable) else 0
        for step in [step for step in committed if step < oldest]:
            self._discard(self.path(step))
        later = [f"step-{step}" for step in committed if step > newest and step not in damaged]
        if later:
            _log.warning("%s lie ahead of step %d and would be resumed from first", ", ".join(later), newest)

    def _settle(self, step: int) -> None:
        """Ends a replacement that a crash cut short: the new one if it was committed, else the old one."""
        final, aside = self.root / f"step-{step}", self.root / f".replaced-step-{step}"
        if os.path.lexists(final):
            self._discard(aside)
        else:
            aside.rename(final)

    def _discard(self, path: Path) -> None:
        """Un-commits by a rename, so that a half-deleted checkpoint never counts, then deletes."""
        trash = self.root / f".trash-{secrets.token_hex(8)}"
        try:
            path.rename(trash)
            _remove(trash)
        except OSError as error:
            _log.warning("cannot delete %s: %s; delete it by hand if space runs out", path, error)

    def _directories(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"cannot list {self.root}: {error.strerror or error}") from error


def _remove(path: Path) -> None:
    """Deletes a flat directory, or a link in its place; links inside are unlinked, never followed."""
    if path.is_symlink():
        path.unlink()
        return
    for inside in list(path.iterdir()):
        inside.unlink()
    path.rmdir()
