"""Kills a process that takes more memory than it was given, as on a full machine: Linux cgroups (version 1)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from longctx.errors import NotAvailableError

ROOT = Path("/sys/fs/cgroup/memory")


def require(root: Path = ROOT) -> None:
    """Refuses where no group can be made."""
    if not (root / "memory.limit_in_bytes").is_file():
        raise NotAvailableError(
            f"{root} is no memory controller of cgroup version 1; without one no process can be held to a fixed "
            "memory: run this benchmark as root on a machine that mounts it"
        )
    if not os.access(root, os.W_OK):
        raise NotAvailableError(f"{root} cannot be written; run this benchmark as root")


@dataclass(frozen=True)
class MemoryGroup:
    """Is one memory cgroup, named by its folder; ``with`` makes it and takes it away."""

    folder: Path

    def __enter__(self) -> MemoryGroup:
        self.folder.mkdir()
        self._write("memory.swappiness", 0)
        return self

    def __exit__(self, *_: object) -> None:
        # The kernel lets go of a killed process a moment after its parent has heard of its end.
        for _attempt in range(50):
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)
        self.folder.rmdir()

    def join(self) -> None:
        """Moves this process in; what it takes from now on is counted."""
        self._write("cgroup.procs", os.getpid())

    def in_use(self) -> int:
        """Counts the bytes that the kernel could not take back: pages of the heap, and its own for the group."""
        return self._stat("rss") + self._number("memory.kmem.usage_in_bytes")

    def peak(self) -> int:
        """Returns the most bytes that the group has held since the last ``reset_peak``."""
        return self._number("memory.max_usage_in_bytes")

    def reset_peak(self) -> None:
        """Starts to count the peak anew."""
        self._write("memory.max_usage_in_bytes", 0)

    def limit(self, limit: int) -> None:
        """Takes back what can be (files that were read), and grants ``limit`` bytes from here on."""
        self._write("memory.force_empty", 0)
        self._write("memory.limit_in_bytes", limit)

    def killed(self) -> bool:
        """Tells whether the limit has ended a process."""
        words = (self.folder / "memory.oom_control").read_text().split()
        return int(words[words.index("oom_kill") + 1]) > 0

    def _stat(self, name: str) -> int:
        lines = (self.folder / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))
