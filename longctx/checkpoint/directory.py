"""Names, commits and deletes the checkpoints of a run in their directory, and clears what a crash may leave behind.

Only ``step-N`` counts in it. Everything else of ours begins with a dot. ``.partial-step-N`` is being written,
``.replaced-step-N`` was committed until a rewound run reached step N again, ``.trash-X`` is being deleted.
``.diverged-step-N`` was written by a run that diverged on it, and goes with the next save. Symbolic links are never
followed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Collection
from pathlib import Path

from longctx.checkpoint.files import storage_errors, sync_directory
from longctx.errors import StorageError

_log = logging.getLogger(__name__)

_STEP = r"step-(0|[1-9][0-9]{0,17})"
_COMMITTED = re.compile(_STEP)
_REPLACED = re.compile(rf"\.replaced-{_STEP}")
_SECONDS = ".save-seconds"  # beside the checkpoints' folder, which holds nothing else
_LEFTOVER = re.compile(rf"\.partial-{_STEP}|\.diverged-{_STEP}|\.trash-[0-9a-f]{{16}}")


class CheckpointDirectory:
    """Lists, makes and deletes the checkpoints of one run. Only rank 0 calls methods that change anything."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._began = 0.0
        self._longest = 0.0

    def steps(self) -> list[int]:
        """Lists the committed steps, ascending; other names, links and files are ignored."""
        names = self._directories()
        matches = [_COMMITTED.fullmatch(name) or _REPLACED.fullmatch(name) for name in names]
        return sorted({int(match[1]) for match in matches if match})

    def path(self, step: int) -> Path:
        """Finds the directory of a committed step: at its name, or aside when a crash cut its replacement short."""
        final, aside = self.root / f"step-{step}", self.root / f".replaced-step-{step}"
        return aside if aside.is_dir() and not os.path.lexists(final) else final

    def partial(self, step: int) -> Path:
        """Names the directory in which a step is being written."""
        return self.root / f".partial-step-{step}"

    def begin(self, step: int) -> None:
        """Clears what crashes have left and makes an empty directory for ``step``."""
        self._began = time.monotonic()
        with storage_errors("cannot prepare a checkpoint in", self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in self._directories():
                if _LEFTOVER.fullmatch(name):
                    _remove(self.root / name)
                elif match := _REPLACED.fullmatch(name):
                    self._settle(int(match[1]))
            self.partial(step).mkdir(mode=0o700)

    def commit(self, step: int) -> None:
        """Makes the partial directory the checkpoint of ``step``, by one rename; before that nothing has happened."""
        sync_directory(self.partial(step))
        final, aside = self.root / f"step-{step}", self.root / f".replaced-step-{step}"
        with storage_errors("cannot commit", final):
            if os.path.lexists(final):
                final.rename(aside)
            self.partial(step).rename(final)
        sync_directory(self.root)
        if os.path.lexists(aside):
            self._discard(aside)
        self._note_seconds()

    def save_seconds(self) -> float | None:
        """Returns how long the longest save of the run's latest process took; None where that is not known."""
        try:
            seconds = float(self.root.with_name(_SECONDS).read_text(encoding="utf-8")[:32])
        except (OSError, ValueError):
            return None
        return seconds if 0 <= seconds < math.inf else None

    def _note_seconds(self) -> None:
        """Writes how long saves take, which a job that is submitted again goes by; only a measure, so it may fail."""
        self._longest = max(self._longest, time.monotonic() - self._began)
        with contextlib.suppress(OSError):
            self.root.with_name(_SECONDS).write_text(f"{self._longest:.3f}\n", encoding="utf-8")

    def abandon(self, step: int) -> None:
        """Frees the space of a save that failed, as far as the disk allows."""
        with contextlib.suppress(OSError):
            _remove(self.partial(step))

    def set_aside(self, step: int) -> None:
        """Takes a committed step out of the list, since nobody should go on from it; the next save deletes it."""
        aside = self.root / f".diverged-step-{step}"
        try:
            if aside.is_dir():
                _remove(aside)
            self.path(step).rename(aside)
            sync_directory(self.root)
        except OSError as error:
            _log.warning("cannot set step %d aside: %s; do not resume from it", step, error)

    def prune(self, keep: int, newest: int, damaged: Collection[int] = (), confirmed: int | None = None) -> None:
        """Deletes all but the ``keep`` newest steps up to ``newest`` (0: none); failures are only reported.

        ``confirmed`` stays as well, with all after it. ``damaged`` ones do not count as kept, and go with those below
        the oldest that does. Later steps belong to a future that this run was rewound from; they are the user's to
        delete.
        """
        committed = self.steps()
        usable = [step for step in committed if step <= newest and step not in damaged]
        oldest = usable[-keep] if 0 < keep <= len(usable) else 0
        oldest = oldest if confirmed is None else min(oldest, confirmed)
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


def source_of(path: str) -> Path:
    """Returns the checkpoint that ``init.from`` names: itself, or the newest of a run. Raises ``StorageError``."""
    named = Path(path)
    root = named / "checkpoints"
    if _COMMITTED.fullmatch(named.name) and named.is_dir():
        return named
    steps = CheckpointDirectory(root).steps()
    if not steps:
        raise StorageError(
            f"init.from={path} holds no committed checkpoint; name a run's directory, or one of its checkpoints/step-N"
        )
    return CheckpointDirectory(root).path(steps[-1])


def _remove(path: Path) -> None:
    """Deletes a flat directory, or a link in its place; links inside are unlinked, never followed."""
    if path.is_symlink():
        path.unlink()
        return
    for inside in list(path.iterdir()):
        inside.unlink()
    path.rmdir()
