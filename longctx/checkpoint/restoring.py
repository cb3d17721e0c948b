"""Restores a run on one rank: manifests, then shards, then the state that is no tensor; refuses before any change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longctx.checkpoint import manifest
from longctx.checkpoint.agreement import this_rank, world_size
from longctx.checkpoint.config_record import another_model, changed_keys
from longctx.checkpoint.files import read_small
from longctx.checkpoint.manifest import Chunk, Commit
from longctx.checkpoint.rng import rng_state, set_rng_state
from longctx.checkpoint.shards import Located, locate, read_shards, read_whole
from longctx.checkpoint.state import (
    COPY,
    check_tensors,
    live_tensors,
    model_tensors,
    optimizer_targets,
    saved_tensors,
)
from longctx.checkpoint.train_state import RunRecord, TrainState
from longctx.errors import ConfigError, LongctxError, StorageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadPlan:
    """Holds a checkpoint that fits a run, and what of the run it is read into.

    ``located``: where the shards of each saved tensor lie. ``rest``: what is no tensor. ``tensors``: the run's
    tensors to read into, by name. ``optimizer``: the state dict around those that are the optimizer's.
    """

    directory: Path
    commit: Commit
    located: dict[str, list[Located]]
    rest: dict[str, Any]
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]


def plan_load(
    directory: Path, commit: Commit, state: TrainState, described: dict[str, Any], run: RunRecord
) -> LoadPlan:
    """Finds what is to be read and into what, and refuses all that can be refused.

    Reads no shards, but moves the loader and the schedule of ``state``.
    """
    live = live_tensors(state.model)
    rest = read_plain_state(directory, commit)
    _require_same_model(directory, rest["config"], run.config)
    located = with_copies(locate(read_manifests(directory, commit)), live)
    first = {name: shards[0][1] for name, shards in located.items() if not name.startswith("rng.")}
    tensors = model_tensors(live)
    check_tensors("model.", tensors, {f"model.{name}" for name in described["model"]}, first, str(directory))
    targets, optimizer = optimizer_targets(
        state.optimizer, live, rest["optimizer"], described, first, str(directory / manifest.STATE)
    )
    check_tensors("optimizer.", targets, saved_tensors(rest["optimizer"]), first, str(directory))
    for name in ("loader", "scheduler") if rest["layout"] != manifest.NO_LAYOUT else ():
        _restore_plain(name, getattr(state, name), rest[name], directory)
    return LoadPlan(directory, commit, located, rest, tensors | targets, optimizer)


def restore(fitted: LoadPlan, state: TrainState, run: RunRecord) -> None:
    """Reads the tensors into ``state``, and goes on drawing random numbers where the layout is the saved one."""
    generators = _generators(fitted, run)
    read_shards(fitted.tensors, {name: fitted.located[name] for name in fitted.tensors})
    state.optimizer.load_state_dict(fitted.optimizer)
    if generators is not None:
        set_rng_state(generators)
    saved = fitted.rest["config"]
    # Earlier checkpoints kept only a digest, which cannot say what has changed.
    known = type(saved) is dict and fitted.rest["layout"] != manifest.NO_LAYOUT
    changed = changed_keys(saved, run.config) if known else {}
    if changed and this_rank() == 0:
        step, words = fitted.commit.step, ", ".join(changed.values())
        _log.warning("step %d was written under another configuration; from here on: %s", step, words)


def _require_same_model(directory: Path, saved: Any, now: Any) -> None:
    """Refuses a configuration under which the weights would be another function of the tokens than was trained."""
    changed = another_model(changed_keys(saved, now)) if type(saved) is dict and saved and now else []
    if changed:
        raise ConfigError(
            f"{directory} is of another model: {', '.join(changed)}; leave these as they were, or start a new run with "
            f"its weights: init.from={directory}"
        )


def _degrees(world: int, layout: Mapping[str, Any]) -> str:
    """Puts a world into words: its ranks, and the axes that it shares them among."""
    axes = " x ".join(f"{axis} {degree}" for axis, degree in layout.items() if degree not in (1, None))
    return f"{world} rank{'s' if world > 1 else ''}{f' ({axes})' if axes else ''}"


def _generators(fitted: LoadPlan, run: RunRecord) -> dict[str, Tensor] | None:
    """Returns the random generators that this rank saved, if the layout is the one that it saved them on.

    Weights that were only brought have none.
    """
    commit, layout = fitted.commit, fitted.rest["layout"]
    if layout == manifest.NO_LAYOUT:
        return None
    if (commit.world, layout) != (world_size(), run.layout):
        if this_rank() == 0:
            _log.warning(
                "random generators start afresh: step %d was saved by %s, this run is %s",
                *(commit.step, _degrees(commit.world, layout), _degrees(world_size(), run.layout)),
            )
        return None
    prefix = f"rng.{this_rank()}."
    states = {
        name.removeprefix(prefix): read_whole(shards)
        for name, shards in fitted.located.items()
        if name.startswith(prefix)
    }
    current = rng_state()["cpu"]
    saved = states.get("cpu")
    if saved is None or (saved.dtype, saved.shape) != (current.dtype, current.shape):
        raise StorageError(f"{fitted.directory} is damaged: no {prefix}cpu of this torch")
    return states


def read_manifests(directory: Path, commit: Commit) -> dict[Path, list[Chunk]]:
    """Reads every rank's shards, by file, with all checks; the manifests' hashes have been checked."""
    chunks: dict[Path, list[Chunk]] = {}
    for rank in range(commit.world):
        path = directory / manifest.manifest_file(rank)
        size = commit.files[manifest.shard_file(rank)].bytes
        data = read_small(path, manifest.LIMIT_JSON)
        chunks[directory / manifest.shard_file(rank)] = manifest.decode_manifest(data, str(path), rank, size)
    manifest.check_coverage((chunk for inside in chunks.values() for chunk in inside), str(directory))
    return chunks


def with_copies(located: dict[str, list[Located]], live: Mapping[str, Tensor]) -> dict[str, list[Located]]:
    """Adds entries to ``located`` for this rank's copies of tied weights, which read what the original reads."""
    for copy in [name for name in live if COPY in name]:
        original = copy.removesuffix(COPY)
        for name in list(located):
            if name == f"model.{original}" or name.startswith(f"optimizer.{original}."):
                located[name.replace(original, copy, 1)] = located[name]
    return located


def read_plain_state(directory: Path, commit: Commit) -> dict[str, Any]:
    """Reads what a checkpoint holds beside tensors, complete; its hash has been checked."""
    path = directory / manifest.STATE
    rest = manifest.decode(read_small(path, manifest.LIMIT_JSON), str(path))
    keys = {"step", "optimizer", "scheduler", "loader", "layout", "config"}
    if type(rest) is not dict or set(rest) != keys or rest["step"] != commit.step:
        raise StorageError(f"{path} is damaged: not the state of step {commit.step}")
    return rest


def _restore_plain(name: str, target: Any, saved: Any, directory: Path) -> None:
    if (target is None) != (saved is None):
        raise ConfigError(f"{directory} was written {'without' if saved is None else 'with'} a {name}")
    if target is None:
        return
    try:
        target.load_state_dict(saved)
    except LongctxError:
        raise
    except Exception as error:
        raise StorageError(f"{directory}: the state of the {name} does not fit: {error}") from error
