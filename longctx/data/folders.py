"""Finds the files below a folder, each once, in a fixed order, and counts what it leaves out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from longctx.data.files import printable, reading
from longctx.errors import DataError

# A run may lie in the folder that it reads: what it writes there is no data, and grows while ranks read.
RUN_CONFIG, RUN_FILES = "config.yaml", frozenset({"metrics.jsonl", ".lock", ".lock-launcher"})
RUNS = "folders of runs"
HIDDEN, TWICE, LOOPS = "hidden", "other names of a file that is read", "links to a folder that is read"

Identity = tuple[int, int]  # device and inode


@dataclass
class Found:
    """Files in the order of their names' parts, and how many things were left out, by reason."""

    paths: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_files(root: Path, excluded: Set[str] = frozenset(), once: bool = True) -> Found:
    """Finds every file below ``root``; hidden ones and folders named in ``excluded`` are left out.

    Links are followed: what a folder names is meant. A file with several names, by links of either kind, is found
    once, under the first name that is no link. A link to a folder that is read anyway, or that lies above it, is left
    out, and so are the folders of runs. ``once=False``: files are not compared, only folders.

    Raises ``DataError`` naming a link to nothing, or a folder that cannot be read.
    """
    found = Found()
    root_identity = _identity(root)
    above = {_identity(folder) for folder in root.resolve().parents}
    entered: set[Identity] = set()
    real, linked = [root], list[Path]()
    while real or linked:
        # Folders that lie here come first, so that a link never takes the place of what it leads to.
        is_real = bool(real)
        folder = real.pop() if is_real else linked.pop(0)
        identity = _identity(folder)
        if identity in entered or (not is_real and identity in above and identity != root_identity):
            found.left_out[LOOPS] += 1
            continue
        entered.add(identity)
        entries = _entries(folder)
        names = {entry.name for entry in entries}
        if folder != root and RUN_CONFIG in names and names & RUN_FILES:
            found.left_out[RUNS] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                found.left_out[HIDDEN] += 1
            elif not _is_folder(entry):
                found.paths.append(Path(entry.path))
            elif entry.name not in excluded:
                (linked if entry.is_symlink() else real).append(Path(entry.path))
    found.paths.sort(key=lambda path: path.parts)
    if once:
        _keep_first_names(found)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with reading(folder), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with reading(entry.path):  # a link that leads to itself
        return entry.is_dir()


def _keep_first_names(found: Found) -> None:
    """Keeps one name of each file."""
    names: dict[Identity, Path] = {}
    for path in sorted(found.paths, key=lambda path: path.is_symlink()):
        names.setdefault(_identity(path), path)
    kept = set(names.values())
    found.left_out[TWICE] += len(found.paths) - len(kept)
    found.left_out += Counter()  # without the zeros
    found.paths = [path for path in found.paths if path in kept]


def _identity(path: Path) -> Identity:
    with reading(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                raise DataError(
                    f"{printable(path)} is a link to {printable(path.readlink())}, where nothing is; mend the link "
                    "or take it out of data.path"
                ) from None
            raise
    return status.st_dev, status.st_ino
