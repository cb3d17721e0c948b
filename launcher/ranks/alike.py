"""States what all ranks of a run must have in common: its configuration, the code, and the data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import longctx
from longctx.config import Config
from longctx.data import Corpus
from longctx.errors import ConfigError, DataError
from longctx.launcher.ranks.meeting import Meeting

PACKAGE = Path(longctx.__file__).parent
SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h"}
CODE = "code of longctx"
FILES = "files"


def agree_on_settings(meeting: Meeting, config: Config, options: Mapping[str, Any]) -> None:
    """Refuses ranks whose configuration, ``options`` of the command, or code differ from those of rank 0."""
    if meeting.world_size == 1:
        return
    if meeting.rank == 0:
        meeting.store.set(FILES, json.dumps(code_digests()))
    meeting.agree(
        "settings",
        settings_of(config, options, meeting.world_size),
        ConfigError,
        "all ranks of a run are started by the same command with the same code",
        lambda key, first: _other_code(meeting) if key == CODE else None,
    )


def agree_on_data(meeting: Meeting, corpus: Corpus) -> None:
    """Refuses ranks that read other data than rank 0."""
    if meeting.world_size == 1:
        return
    meeting.agree(
        "data",
        {"documents": len(corpus), "tokens": corpus.total_tokens, "fingerprint": corpus.fingerprint},
        DataError,
        f"{corpus.source} must hold the same on all machines: copy it anew, or name one place that all can read",
    )


def settings_of(config: Config, options: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Returns everything that decides what a rank computes, by name."""
    import numpy
    import torch

    settings = _flat(config.to_dict())
    if config.run.dir is not None:
        settings["run.dir"] = os.path.realpath(config.run.dir)  # one directory, however each rank spells it
    versions = {"torch": torch.__version__, "numpy": numpy.__version__}  # numpy draws the order of the data
    return {**settings, **options, "WORLD_SIZE": world_size, **versions, CODE: code_digest()}


def code_digest() -> str:
    """Returns the SHA-256 of all sources of the package."""
    return hashlib.sha256(json.dumps(code_digests(), sort_keys=True).encode()).hexdigest()


@cache
def code_digests(package: Path = PACKAGE) -> dict[str, str]:
    """Returns the SHA-256 of each source of the package, by its path in it."""
    found = {}
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            if Path(name).suffix in SOURCES:
                path = Path(folder, name)
                found[str(path.relative_to(package))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _other_code(meeting: Meeting) -> str:
    """Names the files in which this rank's code differs from rank 0's."""
    own, first = code_digests(), json.loads(meeting.store.get(FILES))
    names = sorted(name for name in {*own, *first} if own.get(name) != first.get(name))
    shown = ", ".join(f"longctx/{name} ({_short(own, name)}, rank 0: {_short(first, name)})" for name in names[:4])
    return f"other code in {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(digests: Mapping[str, Any], name: str) -> str:
    return str(digests[name])[:12] if name in digests else "absent"


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as one of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
