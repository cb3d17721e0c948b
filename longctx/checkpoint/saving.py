"""Saves a run on one rank: its shards, their manifest, and on rank 0 the state that is no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longctx.checkpoint import manifest
from longctx.checkpoint.agreement import this_rank, world_size
from longctx.checkpoint.files import FileRecord, write_new
from longctx.checkpoint.manifest import Commit
from longctx.checkpoint.rng import rng_state
from longctx.checkpoint.shards import write_shards
from longctx.checkpoint.state import live_tensors, model_tensors, optimizer_tensors, originals
from longctx.checkpoint.train_state import RunRecord, TrainState


def write_rank(
    directory: Path, step: int, state: TrainState, described: dict[str, Any], run: RunRecord
) -> dict[str, list[Any]]:
    """Writes this rank's files; returns their hashes and sizes by name, as plain values."""
    rank = this_rank()
    live = live_tensors(state.model)
    tensors, own = optimizer_tensors(state.optimizer, live)
    own |= {f"rng.{rank}.{device}": generator for device, generator in rng_state().items()}
    tensors |= model_tensors(originals(live))
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


def write_commit(directory: Path, step: int, written: list[dict[str, list[Any]]]) -> None:
    """Writes the record of all ranks' files, which makes a directory a checkpoint once it has its name."""
    files = {name: FileRecord(*item) for records in written for name, item in records.items()}
    record = manifest.encode_commit(Commit(step, world_size(), files))
    write_new(directory / manifest.COMMIT, [record])


def _plain_state(step: int, state: TrainState, described: dict[str, Any], run: RunRecord) -> Any:
    return manifest.plain(
        {
            "step": step,
            "optimizer": {key: described[key] for key in ("state", "groups")},
            "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
            "loader": None if state.loader is None else state.loader.state_dict(),
            "layout": run.layout,
            "config": run.config,
        },
        "the state of the run",
    )
