"""Writes and reads what a checkpoint says of itself: strict JSON, of which nothing is trusted before it is checked.

``commit.json`` names every file with its hash and is itself hashed; ``rank-R.json`` lists the shards in
``rank-R.safetensors``; ``state.json`` holds what is no tensor. File names follow from the number of ranks
and are never taken from the contents.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from longctx.checkpoint.files import FileRecord
from longctx.errors import StorageError

VERSION = 1
COMMIT, STATE = "commit.json", "state.json"
NO_LAYOUT = "none"  # of weights that no run has computed with yet: nothing else is in the checkpoint
LIMIT_JSON = 256 << 20  # bytes of any JSON file here

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

_MAX_WORLD = 1 << 20
_MAX_SIZE = 1 << 48
_MAX_DIMS = 16
_MAX_DEPTH = 32
_MAX_CELLS = 10_000_000  # of the grid that shards of one tensor may span
_HASH = re.compile(r"[0-9a-f]{64}")
# Names of tensors are no paths, but other tools may make them so.
_NAME = re.compile(r"(?!.*\.\.)[^\x00-\x1f\x7f/\\]{1,1024}", re.DOTALL)


def shard_file(rank: int) -> str:
    """Names the safetensors file that ``rank`` writes."""
    return f"rank-{rank:05d}.safetensors"


def manifest_file(rank: int) -> str:
    """Names the list of what is in ``shard_file(rank)``."""
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class Chunk:
    """Describes one shard: a box of a global tensor, at a byte offset of its rank's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Commit:
    """Holds the record whose presence makes a directory a checkpoint: its step, and every file with its hash."""

    step: int
    world: int
    files: dict[str, FileRecord]


def encode(value: Any) -> bytes:
    """Writes a plain value as bytes, in the one way in which equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes, where: str) -> Any:
    """Reads the plain value in ``data``, which must be exactly what ``encode`` writes of it.

    That refuses duplicate keys, numbers that are none, unusual spellings and trailing bytes in one rule.
    """
    try:
        value = plain(json.loads(data), where)
        same = encode(value) == data
    except (ValueError, RecursionError, StorageError) as error:
        raise _damaged(where, f"no valid JSON ({type(error).__name__})") from error
    if not same:
        raise _damaged(where, "JSON in a form that longctx does not write")
    return value


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Returns ``value`` with tuples as lists, after a check that JSON holds it without loss."""
    if depth > _MAX_DEPTH:
        raise _damaged(where, f"nested deeper than {_MAX_DEPTH}")
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise StorageError(f"{where}: keys {list(value)!r:.80} must be strings to be stored as JSON")
        return {key: plain(inner, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, where, depth + 1) for inner in value]
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise StorageError(f"{where}: {type(value).__name__} {value!r:.80} cannot be stored as JSON")


def encode_commit(commit: Commit) -> bytes:
    """Writes the bytes of ``commit.json``; the record's own hash guards it."""
    record = {"version": VERSION, **asdict(commit)}
    return encode({"record": record, "sha256": hashlib.sha256(encode(record)).hexdigest()})


def decode_commit(data: bytes, where: str, step: int) -> Commit:
    """Reads the commit record of ``step``, complete and consistent."""
    outer = _keys(decode(data, where), ("record", "sha256"), where)
    if hashlib.sha256(encode(outer["record"])).hexdigest() != outer["sha256"]:
        raise _damaged(where, "its SHA-256 is not that of what was written")
    record = _keys(outer["record"], ("version", "step", "world", "files"), where)
    if record["version"] != VERSION:
        raise StorageError(f"{where}: format version {record['version']!r:.20}, this longctx reads {VERSION}")
    if record["step"] != step:
        raise _damaged(where, f"written for step {record['step']!r:.20}")
    world = _integer(record["world"], 1, _MAX_WORLD, where)
    names = [name for rank in range(world) for name in (shard_file(rank), manifest_file(rank))]
    files = _keys(record["files"], (STATE, *names), where)
    return Commit(step, world, {name: _file_record(files[name], where) for name in files})


def encode_manifest(rank: int, chunks: Iterable[Chunk]) -> bytes:
    """Writes the bytes of ``rank-R.json``."""
    return encode({"version": VERSION, "rank": rank, "chunks": [plain(asdict(c), c.name) for c in chunks]})


def decode_manifest(data: bytes, where: str, rank: int, file_bytes: int) -> list[Chunk]:
    """Reads the shards of one rank, each inside its tensor and its file, none on another's bytes."""
    manifest = _keys(decode(data, where), ("version", "rank", "chunks"), where)
    if manifest["version"] != VERSION or manifest["rank"] != rank:
        raise _damaged(where, f"not a manifest of rank {rank} in version {VERSION}")
    chunks = [_chunk(item, where, file_bytes) for item in _list(manifest["chunks"], where)]
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: (chunk.start, chunk.bytes)):
        if chunk.start < end:
            raise _damaged(where, f"the shard of {chunk.name!r:.120} lies on the bytes of another one")
        end = chunk.start + chunk.bytes
    return chunks


def check_coverage(chunks: Iterable[Chunk], where: str) -> None:
    """Raises unless the shards of every tensor agree on it and cover each of its elements exactly once."""
    tensors: defaultdict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        tensors[chunk.name].append(chunk)
    for name, shards in tensors.items():
        if len({(shard.dtype, shard.shape) for shard in shards}) > 1:
            raise _damaged(where, f"the shards of {name!r:.120} disagree on its dtype or shape")
        total, held = math.prod(shards[0].shape), sum(math.prod(shard.sizes) for shard in shards)
        if total != held:
            raise _damaged(where, f"{name!r:.120} has {total} elements, its shards hold {held}")
        if total and not _exact_cover(shards):
            raise _damaged(where, f"the shards of {name!r:.120} overlap or leave gaps")


def _exact_cover(shards: list[Chunk]) -> bool:
    """Counts, on the grid that all shard borders span, how often each cell is covered."""
    borders = [
        np.unique([(s.offsets[dim], s.offsets[dim] + s.sizes[dim]) for s in shards])
        for dim in range(len(shards[0].shape))
    ]
    grid = [len(border) - 1 for border in borders]
    if math.prod(grid) > _MAX_CELLS:
        return False
    count = np.zeros(grid, dtype=np.int32)
    for shard in shards:
        low = [int(np.searchsorted(b, o)) for b, o in zip(borders, shard.offsets)]
        high = [int(np.searchsorted(b, o + s)) for b, o, s in zip(borders, shard.offsets, shard.sizes)]
        count[tuple(slice(a, z) for a, z in zip(low, high))] += 1
    return bool((count == 1).all())


def _chunk(value: Any, where: str, file_bytes: int) -> Chunk:
    item = _keys(value, tuple(Chunk.__dataclass_fields__), where)
    name, dtype = item["name"], item["dtype"]
    if type(name) is not str or not _NAME.fullmatch(name):
        raise _damaged(where, f"{name!r:.80} is no name of a tensor")
    if type(dtype) is not str or dtype not in DTYPES:
        raise _damaged(where, f"{name!r:.120} has the dtype {dtype!r:.40}, known are {', '.join(DTYPES)}")
    shape, offsets, sizes = (
        tuple(_integer(size, 0, _MAX_SIZE, where) for size in _list(item[key], where, _MAX_DIMS))
        for key in ("shape", "offsets", "sizes")
    )
    if not len(shape) == len(offsets) == len(sizes) or any(
        offset + size > whole for offset, size, whole in zip(offsets, sizes, shape)
    ):
        raise _damaged(where, f"a shard of {name!r:.120} lies outside of the tensor")
    start = _integer(item["start"], 0, file_bytes, where)
    size = _integer(item["bytes"], 0, file_bytes - start, where)
    if size != math.prod(sizes) * DTYPES[dtype].itemsize:
        raise _damaged(where, f"a shard of {name!r:.120} has {size} bytes, which its sizes contradict")
    return Chunk(name, dtype, shape, offsets, sizes, start, size)


def _file_record(value: Any, where: str) -> FileRecord:
    item = _keys(value, ("sha256", "bytes"), where)
    if type(item["sha256"]) is not str or not _HASH.fullmatch(item["sha256"]):
        raise _damaged(where, f"{item['sha256']!r:.80} is no SHA-256")
    return FileRecord(item["sha256"], _integer(item["bytes"], 0, _MAX_SIZE, where))


def _keys(value: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    if type(value) is not dict or set(value) != set(keys):
        raise _damaged(where, f"expected an object with the keys {', '.join(keys)}"[:200])
    return value


def _list(value: Any, where: str, most: int | None = None) -> list[Any]:
    if type(value) is not list or (most is not None and len(value) > most):
        raise _damaged(where, "expected a list" + (f" of at most {most}" if most else ""))
    return value


def _integer(value: Any, low: int, high: int, where: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _damaged(where, f"{value!r:.40} is no integer from {low} to {high}")
    return value


def _damaged(where: str, why: str) -> StorageError:
    return StorageError(f"{where} is damaged: {why}")
