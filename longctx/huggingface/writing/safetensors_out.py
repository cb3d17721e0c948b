"""Writes weights as sharded safetensors with their index, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longctx.checkpoint.files import write_new
from longctx.checkpoint.manifest import DTYPE_CODES
from longctx.checkpoint.stream import bytes_of, header_of
from longctx.errors import NumericsError
from longctx.huggingface.weights import INDEX, SINGLE

READABLE = 0o644  # by others too, as far as the user's mask allows
_FORMAT = {"format": "pt"}  # without it transformers refuses a file
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Outgoing:
    """Describes a tensor that is to be written; ``read`` brings it, in whatever dtype it lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Counts what it takes in its file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(directory: Path, tensors: Sequence[Outgoing], shard_bytes: int, tell: Tell) -> list[str]:
    """Writes ``tensors`` into files of at most ``shard_bytes``, or of one larger tensor; returns the files' names."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.bytes for one in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    # Wide elements first, so that each tensor is aligned for readers that map the file.
    shards = [sorted(shard, key=lambda one: -one.dtype.itemsize) for shard in shards]
    total, count = sum(one.bytes for one in tensors), len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]
    told = _counted(total, tell)
    for name, shard in zip(names, shards, strict=True):
        write_new(directory / name, _blocks(shard, told), READABLE)
    if count > 1:
        write_json(
            directory / INDEX,
            {
                "metadata": {"total_parameters": sum(math.prod(one.shape) for one in tensors), "total_size": total},
                "weight_map": {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard},
            },
        )
        names.append(INDEX)
    return names


def write_json(path: Path, value: object) -> None:
    """Writes a file of JSON as people read it."""
    write_new(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()], READABLE)


def _counted(total: int, tell: Tell) -> Callable[[Outgoing], None]:
    done = 0

    def count(one: Outgoing) -> None:
        nonlocal done
        done += one.bytes
        tell(done, total, one.name)

    return count


def _blocks(shard: Sequence[Outgoing], told: Callable[[Outgoing], None]) -> Iterator[bytes | memoryview]:
    yield header_of(((one.name, DTYPE_CODES[one.dtype], one.shape, one.bytes) for one in shard), _FORMAT)
    for one in shard:
        yield from bytes_of(_cast(one))
        told(one)


def _cast(one: Outgoing) -> Tensor:
    found = one.read()
    assert tuple(found.shape) == one.shape, f"{one.name}: read as {list(found.shape)}"
    cast = found.to(one.dtype)
    if cast.dtype == torch.float16 != found.dtype and not cast.isfinite().all():
        raise NumericsError(
            f"{one.name} has numbers up to {found.abs().max().item():.3g}, which float16 cannot hold; nearest valid: "
            "--dtype bfloat16"
        )
    return cast
