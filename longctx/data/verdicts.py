"""Remembers what a check of files has found, for as long as the files stay as they were.

A verdict stands in a file of its own, in a folder that belongs to the user. It holds while name, size, both time
stamps, inode and the check itself are the same. It is made only of files that were last changed a while before the
check began: a later change within one tick of the clock would leave no trace in the stamps.

Processes of one machine that want the same verdict take turns: one reads the files, the others find what it has found.
A folder that cannot be written, or a lock that the file system does not have, costs the memory and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.data.source import Report

TICK = 2.0  # seconds: the coarsest time stamps that are in use
PATIENCE = 120.0  # seconds without a sign of life after which nobody waits for another process's check
_LARGEST = 1 << 16  # bytes of a verdict
_WORTH_A_WAIT = 1 << 28  # bytes whose check takes longer than waiting for the clock
_SHARED = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "cifs", "smb3", "9p", "afs", "panfs"})

Facts = dict[str, Any]


@dataclass(frozen=True)
class Stamp:
    """What tells that an open file is the one that was checked. Times in nanoseconds."""

    path: str
    size: int
    modified: int
    changed: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path, descriptor: int) -> Stamp:
        """Stamps an open file."""
        found = os.fstat(descriptor)
        # An absolute name; links in it are kept, since they may lead elsewhere tomorrow.
        where = str(Path.cwd() / path)
        return cls(where, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    @property
    def latest(self) -> float:
        """Seconds since the epoch at which the file was last touched."""
        return max(self.modified, self.changed) / 1e9

    def written(self) -> list[Any]:
        """Returns the values that a verdict holds; devices are numbered anew at every start of a machine."""
        return [self.path, self.size, self.modified, self.changed, self.inode]


def remembered(
    folder: Path | None,
    check: str,
    stamps: list[Stamp],
    find: Callable[[Report], Facts],
    progress: Report,
    clock: Callable[[], float] = time.time,
) -> Facts:
    """Returns what ``find`` says of the files with these stamps, from memory where that still holds.

    ``folder``: of the verdicts, None for none. ``check``: names what is found, and changes with how. ``find`` takes a
    report of progress, and raises what is wrong with the files: only good ones are remembered.
    """
    if folder is None:
        return find(progress)
    file = folder / "checks" / f"{verdict_name(check, stamps)}.json"
    with _turn(file, progress) as alive:
        held = _read(file, stamps)
        if held is not None:
            return held
        _let_clock_pass(stamps, clock)
        started = clock()

        def report(done: int, total: int, what: str) -> None:
            alive()
            progress(done, total, what)

        found = find(report)
        if all(stamp.latest < started - TICK for stamp in stamps):
            _write(file, stamps, found)
        return found


def verdict_name(check: str, stamps: list[Stamp]) -> str:
    """Returns one name for each set of files and check: a new verdict takes the place of one that is out of date."""
    shared = _shared_devices()
    # On disks of two machines, files of one name are two files, even where all their stamps are the same.
    hosts = sorted({"" if stamp.device in shared else os.uname().nodename for stamp in stamps})
    text = json.dumps([check, hosts, [stamp.path for stamp in stamps]])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _shared_devices() -> set[int]:
    """Returns the devices of file systems that other machines see as well."""
    with contextlib.suppress(OSError, ValueError):
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = set()
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            major, minor = before.split()[2].split(":")
            if after.split()[0].removeprefix("fuse.") in _SHARED:
                found.add(os.makedev(int(major), int(minor)))
        return found
    return set()


def _let_clock_pass(stamps: list[Stamp], clock: Callable[[], float]) -> None:
    """Waits until files that were written just now are old enough for a verdict, where making it takes longer."""
    age = clock() - max(stamp.latest for stamp in stamps)
    if sum(stamp.size for stamp in stamps) >= _WORTH_A_WAIT and 0 <= age <= TICK:
        time.sleep(TICK - age + 0.1)


def _sealed(stamps: list[Any], facts: Facts) -> str:
    text = json.dumps([stamps, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path, stamps: list[Stamp]) -> Facts | None:
    """Returns the facts of a verdict that is whole, is this user's own, and is about files with these stamps."""
    wanted = [stamp.written() for stamp in stamps]
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return None
            held = json.loads(opened.read(_LARGEST))
        facts = held["facts"]
        whole = held["files"] == wanted and held["seal"] == _sealed(wanted, facts)
        return facts if whole and type(facts) is dict else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(file: Path, stamps: list[Stamp], facts: Facts) -> None:
    wanted = [stamp.written() for stamp in stamps]
    put(file, [json.dumps({"files": wanted, "facts": facts, "seal": _sealed(wanted, facts)}).encode()])


def put(file: Path, parts: Iterable[Any]) -> None:
    """Writes a file in one step, where that can be done. ``parts``: buffers, one after another."""
    unfinished = file.with_name(f".{file.name}.{os.uname().nodename}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as opened:
                opened.writelines(parts)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _turn(file: Path, progress: Report) -> Iterator[Callable[[], None]]:
    """Waits while another process makes this verdict; yields a function that shows this one to be alive."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield lambda: None
        return
    try:
        _wait_for_lock(descriptor, progress)
        shown = time.monotonic()

        def alive() -> None:
            nonlocal shown
            if time.monotonic() - shown > PATIENCE / 20:
                shown = time.monotonic()
                os.utime(descriptor)

        with contextlib.suppress(OSError):
            os.utime(descriptor)
        yield alive
    finally:
        os.close(descriptor)  # which lets the lock go, as the end of the process does


def _wait_for_lock(descriptor: int, progress: Report) -> None:
    """Takes the lock, or goes on without it where there are none, or where its holder seems to hang."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EINTR):
                return
        if time.time() - os.fstat(descriptor).st_mtime > PATIENCE:
            return
        progress(0, 0, "another process is checking the same files")
        time.sleep(0.1)
