"""Lets one live process at a time into a run's directory, by locks that the kernel frees when their holder dies.

They are POSIX record locks (fcntl). NFS carries them to its server, so that they hold between machines; kill -9 frees
them and SIGSTOP does not; processes that the holder starts don't have them. There are two: a command that starts ranks
holds one, and the process that writes, rank 0, the other. Whoever of them is left keeps others out.

A file system without locks (Lustre without ``-o flock``, NFS without its lock daemon) is told of in one warning. The
names in the files then keep out processes of the same machine, and nothing keeps out those of others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from longctx.errors import StorageError
from longctx.launcher import env
from longctx.rules import redacted

_log = logging.getLogger(__name__)

LAUNCHER, WRITER = ".lock-launcher", ".lock"
# After a requeue the lock of a node that died stays until the file server's lease ends: NFSv4 gives it 90 seconds.
PATIENCE = 180.0
_LOOK = 1.0  # seconds between two tries
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST_NAME = 1 << 16


@dataclass(frozen=True)
class Holder:
    """Names a process that holds a directory, well enough to find it and to see whether it lives."""

    host: str
    pid: int
    started: str
    command: str
    job: str | None  # of Slurm; the same after a requeue
    birth: str  # boot of the machine and start of the process in its ticks: another process of this pid has another

    @classmethod
    def this_process(cls) -> Holder:
        """Describes this process; passwords in URLs of its command line are left out."""
        command = str(redacted(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])))
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(platform.node(), os.getpid(), now, command, env.job_id(), _birth(os.getpid()))

    @property
    def lives_here(self) -> bool:
        """Tells whether it is a live process of this machine."""
        return self.host == platform.node() and bool(self.birth) and _birth(self.pid) == self.birth


@contextlib.contextmanager
def launching(directory: Path) -> Iterator[None]:
    """Holds ``directory`` for a command whose ranks will write it; nobody else's may be at work in it."""
    with _held(directory / LAUNCHER):
        with _held(directory / WRITER, told=False):
            pass  # no rank is left of a launch whose command has died
        yield


@contextlib.contextmanager
def writing(directory: Path, launched: bool = False) -> Iterator[None]:
    """Holds ``directory`` for the process that writes it. ``launched``: a command of ours holds it for its ranks."""
    with contextlib.ExitStack() as held:
        if not launched:
            held.enter_context(_held(directory / LAUNCHER))
        held.enter_context(_held(directory / WRITER))
        yield


@contextlib.contextmanager
def _held(path: Path, told: bool = True) -> Iterator[None]:
    """Holds the lock of one file, with this process's name in it where ``told``. Raises ``StorageError``."""
    handle, owner = _acquired(path), os.getpid()
    try:
        if told:
            _write(handle, json.dumps(asdict(Holder.this_process())).encode())
        yield
    finally:
        if os.getpid() == owner:  # a forked child that unwinds holds nothing
            if told:
                _write(handle, b"")
            os.close(handle)


def _acquired(path: Path) -> int:
    """Returns a descriptor of the lock's file, locked. Closing any other one of that file would free the lock."""
    deadline = time.monotonic() + PATIENCE
    while True:
        handle = _open(path)
        try:
            locked = _lock(handle, path)
            holder = None if locked else _read(handle)
            # Another process may have removed the file, and its name may be that of a new one by now.
            if locked and _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if locked:
            continue
        if not _may_end_soon(holder) or time.monotonic() > deadline:
            raise StorageError(_refusal(path, holder))
        time.sleep(_LOOK)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"run.dir={path.parent} cannot be written: {path}: {error.strerror or error}") from None


def _lock(handle: int, path: Path) -> bool:
    """Locks the file unless another process has; without locks it asks who the file names."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise StorageError(f"run.dir={path.parent} cannot be locked: {error.strerror or error}") from None
    holder = _read(handle)
    if holder is not None and holder.lives_here:
        return False
    if path.name == WRITER:
        _log.warning(
            "%s lies on a file system without locks: nothing keeps a process of another machine out of it", path.parent
        )
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _may_end_soon(holder: Holder | None) -> bool:
    """Tells whether the holder is this Slurm job before its requeue, on a node that may have died."""
    job = env.job_id()
    return holder is not None and job is not None and holder.job == job and holder.host != platform.node()


def _refusal(path: Path, holder: Holder | None) -> str:
    directory = path.parent
    if holder is None:
        return (
            f"run.dir={directory} is in use by a process that has not said its name; wait for its end, or name another"
        )
    here = holder.host == platform.node()
    gone = "" if here else f"; if {holder.host} is gone for good, remove {path}"
    return (
        f"run.dir={directory} is in use by process {holder.pid} on {holder.host} since {holder.started} "
        f"({holder.command}); wait for its end, or end it (kill {holder.pid}), or name another run.dir{gone}"
    )


def _read(handle: int) -> Holder | None:
    """Reads who holds the file; None while its holder has not written its name."""
    try:
        found = json.loads(os.pread(handle, _LONGEST_NAME, 0))
        return Holder(**found)
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write(handle: int, name: bytes) -> None:
    """Replaces what the file says; on a full disk the lock holds all the same."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, name, 0)


def _birth(pid: int) -> str:
    """Returns the boot of this machine and the start of a process in ticks; empty where there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else f"{boot} {fields[18]}"
