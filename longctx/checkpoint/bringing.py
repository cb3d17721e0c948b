"""Writes weights from elsewhere as the checkpoint of step 0, one tensor at a time: no rank ever holds the model.

The ranks share the tensors, whatever the mesh will be. A run that goes on from it begins its data, its schedule and
its optimizer anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.checkpoint import manifest
from longctx.checkpoint.agreement import run_on_all_ranks, this_rank, world_size
from longctx.checkpoint.config_record import recorded_config
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.checkpoint.files import write_new
from longctx.checkpoint.manifest import DTYPE_CODES, Chunk
from longctx.checkpoint.saving import write_commit
from longctx.checkpoint.shards import Read, write_boxes
from longctx.errors import LongctxError, NumericsError

Tell = Callable[[int, int, str], None]
_STEP = 0


@dataclass(frozen=True)
class Brought:
    """Describes a tensor that comes from elsewhere; ``read`` brings it in this dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Read

    @property
    def bytes(self) -> int:
        """Counts what it takes in the checkpoint."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_step_zero(
    root: Path, tensors: Mapping[str, Brought], optimizer: dict[str, Any], config: Mapping[str, Any], tell: Tell
) -> Path:
    """Writes and commits step 0 below ``root``; every rank calls it with the same arguments.

    ``tensors``: by the names of the model. ``optimizer``: its description, which has no state. ``config``: the run's.
    """
    directory = CheckpointDirectory(root)
    partial = directory.partial(_STEP)
    try:
        run_on_all_ranks(lambda: directory.begin(_STEP) if this_rank() == 0 else None)
        written = run_on_all_ranks(lambda: _write_share(partial, tensors, optimizer, config, tell))
        run_on_all_ranks(lambda: _commit(directory, written) if this_rank() == 0 else None)
    except LongctxError:
        if this_rank() == 0:
            directory.abandon(_STEP)
        raise
    return directory.path(_STEP)


def _commit(directory: CheckpointDirectory, written: list[dict[str, list[Any]]]) -> None:
    write_commit(directory.partial(_STEP), _STEP, written)
    directory.commit(_STEP)


def _write_share(
    partial: Path, tensors: Mapping[str, Brought], optimizer: dict[str, Any], config: Mapping[str, Any], tell: Tell
) -> dict[str, list[Any]]:
    rank = this_rank()
    own = share(tensors, world_size())[rank]
    total, done = sum(tensors[name].bytes for name in own), 0

    def reading(name: str) -> Read:
        def read() -> Tensor:
            nonlocal done
            found = tensors[name].read()
            if not torch.linalg.vector_norm(found, math.inf).isfinite():
                raise NumericsError(f"{name} holds numbers that are not finite; no run can begin with them")
            done += tensors[name].bytes
            tell(done, total, name)
            return found

        return read

    boxes: list[tuple[Chunk, Read]] = [
        (
            Chunk(f"model.{name}", DTYPE_CODES[one.dtype], one.shape, (0,) * len(one.shape), one.shape, 0, one.bytes),
            reading(name),
        )
        for name, one in tensors.items()
        if name in own
    ]
    record, chunks = write_boxes(partial / manifest.shard_file(rank), boxes)
    listing = write_new(partial / manifest.manifest_file(rank), [manifest.encode_manifest(rank, chunks)])
    records = {manifest.shard_file(rank): record, manifest.manifest_file(rank): listing}
    if rank == 0:
        rest = {
            "step": _STEP,
            "optimizer": {key: optimizer[key] for key in ("state", "groups")},
            "scheduler": None,
            "loader": None,
            "layout": manifest.NO_LAYOUT,
            "config": recorded_config(config),
        }
        encoded = manifest.encode(manifest.plain(rest, "the state of the run"))
        records[manifest.STATE] = write_new(partial / manifest.STATE, [encoded])
    return {name: [item.sha256, item.bytes] for name, item in records.items()}


def share(tensors: Mapping[str, Brought], world: int) -> list[set[str]]:
    """Divides tensors among ranks, the largest first, to whoever has least."""
    shares: list[set[str]] = [set() for _ in range(world)]
    loads = [0] * world
    for name in sorted(tensors, key=lambda one: (-tensors[one].bytes, one)):
        least = loads.index(min(loads))
        shares[least].add(name)
        loads[least] += tensors[name].bytes
    return shares
