"""Finds the committed steps that are intact, by hashing every file, each on one rank.

Without ``hashed``, files of weights are only as long as they must be: a look that takes no time, where they are to be
hashed later.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from longctx.checkpoint import manifest
from longctx.checkpoint.agreement import run_on_all_ranks, this_rank, world_size
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.checkpoint.files import FileRecord, check_file, check_size, read_small
from longctx.checkpoint.manifest import Commit
from longctx.errors import StorageError

_log = logging.getLogger(__name__)


class IntactSteps:
    """Verifies the checkpoints of one run, so that all ranks agree on what may be loaded.

    ``damaged``: steps found damaged, until they are written anew.
    """

    def __init__(self, directory: CheckpointDirectory) -> None:
        self._directory = directory
        self.damaged: set[int] = set()
        self._checked: dict[Path, tuple[object, ...]] = {}

    def newest(self, limit: int | None = None, tell: bool = False, hashed: bool = True) -> Commit | None:
        """Finds the newest step below ``limit`` that is intact on all ranks; None where there is none.

        ``tell`` reports the damaged ones above it. Raises ``StorageError`` when there are checkpoints but none is
        intact: starting over would lose them.
        """
        views = run_on_all_ranks(self._directory.steps)
        if any(view != views[0] for view in views) and this_rank() == 0:
            _log.warning("ranks see different checkpoints in %s: %s", self._directory.root, views)
        common = sorted(set.intersection(*map(set, views)), reverse=True)
        if not common and any(views):
            raise StorageError(
                f"no checkpoint in {self._directory.root} is seen by all ranks; they must share the folder"
            )
        damage: dict[int, str] = {}
        for step in [step for step in common if limit is None or step < limit]:
            try:
                found = self.verified(step, hashed)
            except StorageError as error:
                damage[step] = str(error)
                self.damaged.add(step)
                continue
            # Only now: where nothing is intact, the error below says it all.
            for broken, why in damage.items() if tell and this_rank() == 0 else ():
                _log.warning("step %d is left out: %s", broken, why)
            return found
        if damage and limit is None:
            newest = damage[max(damage)]
            raise StorageError(
                f"none of {len(damage)} checkpoints in {self._directory.root} is intact; newest: {newest}"
            )
        return None

    def exactly(self, step: int, hashed: bool = True) -> Commit:
        """Verifies ``step`` and no other; the error for a damaged one names the newest intact earlier step."""
        try:
            return self.verified(step, hashed)
        except StorageError as error:
            earlier = self.newest(step, hashed=hashed)
            found = f"step {earlier.step}" if earlier else "none"
            raise StorageError(f"cannot load step {step}: {error}; newest intact earlier one: {found}") from error

    def verified(self, step: int, hashed: bool = True) -> Commit:
        """Checks every file, each on one rank, and that all ranks read the same record."""
        path = self._directory.path(step) / manifest.COMMIT
        commit: list[Commit] = []

        def check_share() -> str:
            if step not in self._directory.steps():
                raise StorageError(f"{path.parent} is no committed checkpoint")
            data = read_small(path, manifest.LIMIT_JSON)
            commit.append(manifest.decode_commit(data, str(path), step))
            for number, (name, record) in enumerate(sorted(commit[0].files.items())):
                if number % world_size() == this_rank():
                    self._check_once(path.parent / name, record, hashed or name.endswith(".json"))
            return hashlib.sha256(data).hexdigest()

        if len(set(run_on_all_ranks(check_share))) > 1:
            raise StorageError(f"{path} differs between ranks: all of them must see one shared directory")
        return commit[0]

    def _check_once(self, path: Path, record: FileRecord, hashed: bool) -> None:
        """Hashes an untouched file once, however often it is asked for, or only looks at its size."""
        try:
            info = os.lstat(path)
        except OSError as error:
            raise StorageError(f"{path} is missing: {error.strerror or error}") from error
        if not hashed:
            check_size(path, info.st_size, record)
            return
        stamp = (record, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if self._checked.get(path) != stamp:
            check_file(path, record)
            self._checked[path] = stamp
