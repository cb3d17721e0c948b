"""Moves tensors to and from a checkpoint: each rank writes the shards that it owns and reads those that it needs.

PyTorch's checkpoint planners say which box of a global tensor a rank holds and which saved boxes overlap it. That is
what makes any layout readable on any other. Their storage layer pickles, so this one is our own. It has a safetensors
file per rank, written as a stream and read by byte ranges that the manifests state.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from longctx.checkpoint.agreement import this_rank
from longctx.checkpoint.files import FileRecord, opened, read_range, write_new
from longctx.checkpoint.manifest import DTYPE_CODES, DTYPES, Chunk
from longctx.checkpoint.stream import bytes_of, header_of
from longctx.errors import StorageError

Located = tuple[Path, Chunk]  # the file that holds a shard, and where in it
Read = Callable[[], Tensor]
_PART = 16 << 20  # bytes that are read at one time where a tensor is whole in one file


def write_shards(
    path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[FileRecord, list[Chunk]]:
    """Writes this rank's part of ``tensors``, which other ranks share, and all of ``own``.

    A replica is written once: of a DTensor by the first rank along each replicated axis, of a plain tensor by
    rank 0.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    mine = {name: tensor for name, tensor in tensors.items() if _owns(tensor)} | dict(own)
    planner.set_up_planner(mine, is_coordinator=this_rank() == 0)
    boxes: list[tuple[Chunk, Read]] = []
    for item in planner.create_local_plan().items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is no tensor"
        local = planner.resolve_data(item)
        assert isinstance(local, Tensor) and local.shape == data.chunk.sizes, f"{item.index.fqn}: odd shard"
        if local.dtype not in DTYPE_CODES:
            raise StorageError(f"{item.index.fqn}: {local.dtype} has no code in safetensors")
        if local.numel() or not math.prod(data.size):
            offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
            code, size = DTYPE_CODES[local.dtype], local.numel() * local.element_size()
            boxes.append(
                (Chunk(item.index.fqn, code, tuple(data.size), offsets, sizes, 0, size), partial(_same, local))
            )
    return write_boxes(path, boxes)


def read_shards(tensors: Mapping[str, Tensor], located: Mapping[str, list[Located]]) -> None:
    """Fills this rank's part of ``tensors`` in place, from whatever layout was saved."""
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        planner.set_up_planner(dict(tensors), _metadata(located), is_coordinator=this_rank() == 0)
        files: dict[Path, int] = {}
        for item in planner.finish_plan(planner.create_local_plan()).items:
            target = planner.resolve_tensor(item)
            path, chunk = _find(located[item.storage_index.fqn], tuple(item.storage_index.offset or ()))
            if path not in files:
                files[path] = stack.enter_context(opened(path))
            target.copy_(_read_box(files[path], path, chunk, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)


def read_whole(located: list[Located]) -> Tensor:
    """Reads a plain tensor that one rank wrote whole."""
    (path, chunk) = located[0]
    if chunk.sizes != chunk.shape:
        raise StorageError(f"{path} is damaged: {chunk.name!r:.120} is split, though one rank wrote it")
    with opened(path) as handle:
        return _read_box(handle, path, chunk, torch.Size(chunk.offsets), torch.Size(chunk.sizes))


def read_joined(located: list[Located], dtype: torch.dtype | None = None) -> Tensor:
    """Reads a whole tensor, from the shards of whichever ranks hold it; ``dtype``: None for the saved one.

    Rows of one shard are read in parts, so that no second copy of a large tensor is ever held.
    """
    path, first = located[0]
    whole = torch.empty(first.shape, dtype=dtype or DTYPES[first.dtype])
    if first.sizes != first.shape or not first.shape or not first.bytes:
        read_shards({first.name: whole}, {first.name: located})
        return whole
    rows = first.shape[0]
    step = max(1, _PART * rows // first.bytes)
    with opened(path) as handle:
        for start in range(0, rows, step):
            lengths = torch.Size((min(step, rows - start), *first.shape[1:]))
            offsets = torch.Size((start, *(0 for _ in first.shape[1:])))
            whole[start : start + step] = _read_box(handle, path, first, offsets, lengths)
    return whole


def locate(chunks: Mapping[Path, list[Chunk]]) -> dict[str, list[Located]]:
    """Lists the shards of every tensor, by its name."""
    located: defaultdict[str, list[Located]] = defaultdict(list)
    for path, inside in chunks.items():
        for chunk in inside:
            located[chunk.name].append((path, chunk))
    return dict(located)


def _owns(tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return this_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(where == 0 for where, kind in zip(coordinate, tensor.placements) if kind.is_replicate())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def write_boxes(path: Path, boxes: list[tuple[Chunk, Read]]) -> tuple[FileRecord, list[Chunk]]:
    """Writes boxes of tensors into one file, each read when its turn comes; returns where they lie in it."""
    # Wide elements first, so that each tensor is aligned for readers that map the file.
    boxes = sorted(boxes, key=lambda box: (-DTYPES[box[0].dtype].itemsize, box[0].name))
    header = header_of((chunk.name, chunk.dtype, chunk.sizes, chunk.bytes) for chunk, _ in boxes)
    chunks, start = [], len(header)
    for chunk, _ in boxes:
        chunks.append(replace(chunk, start=start))
        start += chunk.bytes

    def blocks() -> Iterator[bytes | memoryview]:
        yield header
        for _, read in boxes:
            yield from bytes_of(read())  # one tensor at a time leaves its device

    return write_new(path, blocks()), chunks


def _metadata(located: Mapping[str, list[Located]]) -> Metadata:
    """Builds what the load planner needs to know of the saved shards."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[shards[0][1].dtype]),
                torch.Size(shards[0][1].shape),
                [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for _, chunk in shards],
            )
            for name, shards in located.items()
        }
    )


def _find(shards: list[Located], offsets: tuple[int, ...]) -> Located:
    return next(shard for shard in shards if shard[1].offsets == offsets)


def _read_box(handle: int, path: Path, chunk: Chunk, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    """Reads a box of a shard; only the rows that hold it are read."""
    dtype = DTYPES[chunk.dtype]
    if not chunk.bytes:
        return torch.empty(chunk.sizes, dtype=dtype)
    if not chunk.sizes:
        return torch.frombuffer(read_range(handle, chunk.start, chunk.bytes, path), dtype=dtype).reshape(())
    row = chunk.bytes // chunk.sizes[0]
    data = read_range(handle, chunk.start + offsets[0] * row, lengths[0] * row, path)
    box = torch.frombuffer(data, dtype=dtype).reshape(lengths[0], *chunk.sizes[1:])
    for dim in range(1, len(chunk.sizes)):
        box = box.narrow(dim, offsets[dim], lengths[dim])
    return box
