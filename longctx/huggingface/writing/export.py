"""Writes a checkpoint of any mesh as a model directory, one tensor at a time; the model is never built."""

from __future__ import annotations

import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.checkpoint.files import storage_errors, sync_directory
from longctx.checkpoint.manifest import DTYPE_CODES, DTYPES, Commit
from longctx.checkpoint.restoring import read_manifests
from longctx.checkpoint.shards import Located, locate, read_joined
from longctx.checkpoint.state import COPY
from longctx.config import ModelConfig
from longctx.errors import ConfigError, StorageError
from longctx.huggingface.config_in import CONFIG
from longctx.huggingface.joining import joined
from longctx.huggingface.names import place_of
from longctx.huggingface.pieces import in_class
from longctx.huggingface.weights import HEAD
from longctx.huggingface.writing.config_out import Written, config_of
from longctx.huggingface.writing.safetensors_out import READABLE, Outgoing, Tell, write_json, write_weights
from longctx.huggingface.writing.source import TOKENIZER, ModelSource, copy_files, read_kept_config, read_source
from longctx.huggingface.writing.stored import stored_before, stored_tensors

_OWN = "model."
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Exported:
    """Says what was written."""

    family: str
    architecture: str
    dtype: str
    tensors: int
    bytes: int
    files: list[str]
    notes: list[str]


def export(
    checkpoint: Path,
    commit: Commit,
    model: ModelConfig,
    seq_len: int,
    kept: Path,
    target: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    tell: Tell,
) -> Exported:
    """Writes the weights of a verified ``checkpoint`` and all that belongs to them into the new directory ``target``.

    ``kept``: what the run keeps of the directory that it began with, where it did. ``dtype``: None for the one that
    each tensor had there. Nothing is at ``target`` before all is.
    """
    refuse_occupied(target)
    source = read_source(kept)
    before = read_kept_config(kept) if source else None
    located = {
        name.removeprefix(_OWN): shards
        for name, shards in locate(read_manifests(checkpoint, commit)).items()
        if name.startswith(_OWN) and COPY not in name
    }
    written = config_of(model, seq_len, before, _named(dtype, before, source, located))
    outgoing = _outgoing(written, model, located, source, dtype)
    with _beside(target) as folder:
        files = write_weights(folder, outgoing, shard_bytes, tell)
        write_json(folder / CONFIG, written.keys)
        files.append(CONFIG)
        files += copy_files(kept, source, kept.with_name(TOKENIZER), folder, READABLE)
    size = sum(one.bytes for one in outgoing)
    family, said = written.family, written.keys["dtype"]
    return Exported(family.model_type, family.architecture, said, len(outgoing), size, files, written.notes)


def refuse_occupied(target: Path) -> None:
    """Refuses to write where anything lies."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"--to {target} is no directory; name a new one")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"--to {target} is not empty; name a new directory, or remove what is there")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yields a folder beside ``target`` that takes its name once all is in it; on an error it is removed."""
    folder = target.absolute().with_name(f".{target.absolute().name}.partial-{secrets.token_hex(4)}")
    with storage_errors("cannot write", target):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    try:
        yield folder
        sync_directory(folder)
        with storage_errors("cannot write", target):
            if target.is_dir():
                target.rmdir()  # it is empty, or this refuses
            folder.rename(target.absolute())
        sync_directory(target.absolute().parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _named(
    dtype: torch.dtype | None,
    before: Mapping[str, Any] | None,
    source: ModelSource | None,
    located: dict[str, list[Located]],
) -> str:
    """Names the dtype that the configuration states: as asked, as found there, or that of most tensors."""
    found = (before or {}).get("dtype") or (before or {}).get("torch_dtype")
    if dtype is None and isinstance(found, str):
        return found
    codes = source.tensors.values() if source else [shards[0][1].dtype for shards in located.values()]
    chosen = dtype or DTYPES[Counter(codes).most_common(1)[0][0]]
    return str(chosen).removeprefix("torch.")


def _outgoing(
    written: Written,
    model: ModelConfig,
    located: dict[str, list[Located]],
    source: ModelSource | None,
    dtype: torch.dtype | None,
) -> list[Outgoing]:
    names, found = written.family.names, source.tensors if source else {}
    if not located:
        raise StorageError("the checkpoint holds no weights")
    # Of a larger model's file only the part that is written stays, under the names that it has alone.
    before = stored_before(None if written.alone else source, names)
    usual = Counter(found.values()).most_common(1)[0][0] if found else None
    dtypes = {in_class(name, names)[0]: code for name, code in found.items()}
    outgoing = {}
    for place in {place_of(name, model, names) for name in located}:
        parts = [located[part] for part in place.parts]
        code = dtypes.get(place.name) or usual or parts[0][0][1].dtype
        for one in stored_tensors(place, [part[0][1].shape for part in parts], model, names, before.get(place.name)):
            outgoing[one.name] = Outgoing(one.name, dtype or DTYPES[code], one.shape, partial(_read, parts, one.rows))
    if HEAD in found and HEAD not in outgoing and model.tie_embeddings:
        shards = located["embedding.weight"]
        kept, shape = dtype or DTYPES[found[HEAD]], shards[0][1].shape
        outgoing[HEAD] = Outgoing(HEAD, kept, shape, partial(read_joined, shards))
    assert all(one.dtype in DTYPE_CODES for one in outgoing.values()), "dtypes of safetensors"
    order = {name: number for number, name in enumerate(found)}
    return sorted(outgoing.values(), key=lambda one: (order.get(one.name, len(order)), _natural(one.name)))


def _read(parts: Sequence[list[Located]], rows: slice) -> Tensor:
    """Reads rows of what joins these parameters."""
    whole = joined([read_joined(part) for part in parts])
    return whole[rows] if whole.ndim else whole


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 behind layer 9, and the head behind all."""
    return [name == HEAD, *((int(part), "") if part.isdigit() else (0, part) for part in _NUMBER.split(name))]
