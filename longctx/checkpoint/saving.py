"""Saves a run on one rank: its shards, their manifest, and on rank 0 the state that is no tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longctx.checkpoint import manifest
from longctx.checkpoint.agreement import this_rank, world_size
from longctx.checkpoint.files import FileRecord, write_new
from longctx.checkpoint.manifest import Commit
from longctx.checkpoint.shards import write_shards
from longctx.checkpoint.state import model_tensors, optimizer_tensors, originals
from longctx.checkpoint.train_state import RunRecord, StateAtRest
from longctx.errors import NumericsError


def write_rank(
    directory: Path, step: int, state: StateAtRest, described: dict[str, Any], run: RunRecord
) -> dict[str, list[Any]]:
    """Writes this rank's files; returns their hashes and sizes by name, as plain values."""
    rank = this_rank()
    tensors, own = optimizer_tensors(state.optimizer, state.live)
    tensors |= model_tensors(originals(state.live))
    require_finite(tensors | own, step)
    own |= {f"rng.{rank}.{device}": generator for device, generator in state.rng.items()}
    record, chunks = write_shards(directory / manifest.shard_file(rank), tensors, own)
    listing = manifest.encode_manifest(rank, chunks)
    records = {
        manifest.shard_file(rank): record,
        manifest.manifest_file(rank): write_new(directory / manifest.manifest_file(rank), [listing]),
    }
    if rank == 0:
        rest = manifest.encode(_plain_state(step, state, described, run))
        records[manifest.STATE] = write_new(directory / manifest.STATE, [rest])
    return {name: [item.sha256, item.bytes] for name, item in records.items()}


def require_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raises ``NumericsError`` with the first tensor of this rank that holds NaN or infinity: nobody can go on there.

    Losses say it one step later, which may be after the last good checkpoint was deleted.
    """
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # The largest magnitude is NaN where anything is, and needs no tensor of the same size.
        if local.is_floating_point() and local.numel() and not torch.linalg.vector_norm(local, math.inf).isfinite():
            raise NumericsError(f"step {step}: {name} is not finite after the update, and was not saved")


def write_commit(directory: Path, step: int, written: list[dict[str, list[Any]]]) -> None:
    """Writes the record of all ranks' files, which makes a directory a checkpoint once it has its name."""
    files = {name: FileRecord(*item) for records in written for name, item in records.items()}
    record = manifest.encode_commit(Commit(step, world_size(), files))
    write_new(directory / manifest.COMMIT, [record])


def _plain_state(step: int, state: StateAtRest, described: dict[str, Any], run: RunRecord) -> Any:
    return manifest.plain(
        {
            "step": step,
            "optimizer": {key: described[key] for key in ("state", "groups")},
            "scheduler": state.scheduler,
            "loader": state.loader,
            "layout": run.layout,
            "config": run.config,
        },
        "the state of the run",
    )
