"""Keeps in a run what its weights' directory said beside them, so that an export needs the directory no more.

The folder holds the files themselves and ``source.json``: their hashes, and each tensor's dtype under the name that it
had. The record's own hash guards it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.checkpoint.files import FileRecord, check_file, read_small, storage_errors, write_new
from longctx.checkpoint.manifest import DTYPES, LIMIT_JSON, decode, encode
from longctx.errors import StorageError
from longctx.huggingface.config_in import CONFIG
from longctx.huggingface.weights import locate_weights

RECORD = "source.json"
TOKENIZER = "tokenizer"  # folder beside the kept files, of the tokenizer that the run was trained with
_VERSION = 1
_OF_TOKENIZER = frozenset(
    (
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json"),
        *("chat_template.jinja", "chat_template.json"),
    )
)
# What others need beside the weights; never code, and never weights.
_CARRIED = f"""
    {CONFIG} generation_config.json
    tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json
    vocab.json vocab.txt merges.txt spiece.model tekken.json
    chat_template.jinja chat_template.json additional_chat_templates/*.jinja
    LICENSE LICENSE.txt LICENSE.md NOTICE NOTICE.txt
""".split()


@dataclass(frozen=True)
class ModelSource:
    """Says what a directory held. ``tensors``: dtype by name, in order. ``files``: what is kept of it, by name.

    ``rows``: the first size of each tensor, for those that files hold in several parts.
    """

    path: str
    tensors: dict[str, str]
    files: dict[str, FileRecord]
    rows: dict[str, int]


def keep_source(directory: Path, target: Path) -> ModelSource:
    """Copies into the new folder ``target`` what is needed of ``directory``, which may be such a folder itself."""
    known = read_source(directory) if (directory / RECORD).is_file() else None
    with storage_errors("cannot keep what belongs to the model in", target):
        target.mkdir(mode=0o700)
        names = list(known.files) if known else _carried(directory)
        files = {}
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            # Caches of downloads hold links to files that lie elsewhere.
            files[name] = write_new(target / name, [read_small((directory / name).resolve(), LIMIT_JSON)])
        if known is None:
            located = locate_weights(directory)
            dtypes = {name: chunk.dtype for name, (_, chunk) in located.items()}
            rows = {name: chunk.shape[0] for name, (_, chunk) in located.items() if chunk.shape}
            known = ModelSource(str(directory.absolute()), dtypes, files, rows)
        record = {"version": _VERSION, **asdict(known)}
        # Names stand in the order of the directory, which sorted keys would lose.
        record["tensors"] = list(known.tensors.items())
        write_new(target / RECORD, [encode({"record": record, "sha256": hashlib.sha256(encode(record)).hexdigest()})])
    return known


def read_source(folder: Path) -> ModelSource | None:
    """Reads what ``keep_source`` wrote, with all hashes checked; None where a run has nothing of the kind."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        outer = decode(read_small(path, LIMIT_JSON), str(path))
        record = outer["record"]
        sound = hashlib.sha256(encode(record)).hexdigest() == outer["sha256"] and record["version"] == _VERSION
        tensors = dict(record["tensors"])
        files = {name: FileRecord(**item) for name, item in record["files"].items()}
        rows = dict(record["rows"])
        sound = sound and all(type(count) is int for count in rows.values())
        sound = sound and set(tensors.values()) <= set(DTYPES) and all(map(_is_inside, files))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{path} is damaged: {type(error).__name__}") from error
    if not sound:
        raise StorageError(f"{path} is damaged: not what was written")
    for name, expected in files.items():
        check_file(folder / name, expected)
    return ModelSource(record["path"], tensors, files, rows)


def copy_files(folder: Path, source: ModelSource | None, tokenizer: Path, target: Path, mode: int) -> list[str]:
    """Copies the kept files but the configuration, which is written anew; returns their names.

    ``tokenizer``: folder of the tokenizer that the run was trained with, if it had one; it wins over the directory's.
    """
    own = sorted(path.name for path in tokenizer.iterdir()) if tokenizer.is_dir() else []
    names = {name: folder for name in source.files if name != CONFIG} if source else {}
    if own:
        names = {name: place for name, place in names.items() if name not in _OF_TOKENIZER}
        names = {**dict.fromkeys(own, tokenizer), **names}
    for name, place in names.items():
        (target / name).parent.mkdir(exist_ok=True)
        write_new(target / name, [read_small(place / name, LIMIT_JSON)], mode)
    return list(names)


def read_kept_config(folder: Path) -> Mapping[str, Any]:
    """Returns the keys of the configuration as it was found."""
    keys: Mapping[str, Any] = json.loads(read_small(folder / CONFIG, LIMIT_JSON))
    return keys


def remove_source(folder: Path) -> None:
    """Removes a folder that was not finished."""
    shutil.rmtree(folder, ignore_errors=True)


def _carried(directory: Path) -> list[str]:
    return [
        path.relative_to(directory).as_posix()
        for pattern in _CARRIED
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    ]


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return 1 <= len(parts) <= 2 and all(part not in ("", ".", "..") and "\\" not in part for part in parts)
