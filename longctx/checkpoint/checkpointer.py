"""Checkpoints: the whole state of a run, sharded, hashed, committed by one rename, readable on any layout.

    checkpointer = Checkpointer(run_dir / "checkpoints", keep=3, layout={"sp": 4, "dp_shard": 1})
    checkpointer.save(step, TrainState(model, optimizer, scheduler, loader, step))
    checkpointer.load(state)                 # the newest that is intact; returns its step

Every rank calls every method. All ranks must see the same directory, as on a shared file system. No method
unpickles, and ranks exchange nothing but tensors.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from longctx.checkpoint import manifest
from longctx.checkpoint.agreement import this_rank, together, world_size
from longctx.checkpoint.files import (
    CheckpointDirectory,
    FileRecord,
    check_file,
    read_small,
    write_new,
)
from longctx.checkpoint.manifest import Chunk, Commit
from longctx.checkpoint.rng import rng_state, set_rng_state
from longctx.checkpoint.shards import Located, locate, read_shards, read_whole, write_shards
from longctx.checkpoint.state import (
    COPY,
    changed_keys,
    check_tensors,
    describe,
    join,
    live_tensors,
    model_tensors,
    optimizer_targets,
    optimizer_tensors,
    originals,
    recorded_config,
    saved_tensors,
)
from longctx.errors import ConfigError, LongctxError, StorageError

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What a checkpoint holds.

    ``scheduler`` and ``loader`` have ``state_dict`` and ``load_state_dict`` of plain JSON values, equal on
    all ranks; either may be None.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    loader: Any
    step: int


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Args:
        directory: holds ``step-N``; made at the first save, readable by this user only.
        keep: newest committed checkpoints to keep, 0 for all.
        layout: plain mapping that tells runs apart whose ranks draw different random numbers. Generators are
            restored only where world size and layout are those of the checkpoint.
        config: the configuration as plain sections; what differs from the one that was saved is told on load.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 3,
        *,
        layout: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._directory = CheckpointDirectory(Path(directory))
        self._keep = keep
        self._layout = manifest.plain(layout or {}, "layout")
        self._config = recorded_config(config or {})
        self._damaged: set[int] = set()  # steps found damaged, until they are written anew
        self._checked: dict[Path, tuple[object, ...]] = {}

    def save(self, step: int, state: TrainState) -> Path:
        """Writes and commits ``step``, then deletes what ``keep`` leaves over.

        Raises ``StorageError`` on every rank when any rank's disk refuses; earlier checkpoints stay intact.
        """
        try:
            together(lambda: self._directory.begin(step) if this_rank() == 0 else None)
            described = self._described(state)
            written = together(lambda: self._write(step, state, described))
            together(lambda: self._commit(step, written) if this_rank() == 0 else None)
        except StorageError as error:
            if this_rank() == 0:
                self._directory.abandon(step)
            raise StorageError(f"step {step} was not saved, earlier ones are intact: {error}") from error
        self._damaged.discard(step)
        if this_rank() == 0:
            self._directory.prune(self._keep, step, self._damaged)
        return self._directory.path(step)

    def newest(self) -> int | None:
        """The newest committed step that is intact, found by reading it; None where there is none at all.

        Says nothing of damaged ones, for ``load`` will. Raises ``StorageError`` when there are checkpoints but
        none is intact: starting over would lose them.
        """
        found = self._newest_before(None)
        return None if found is None else found.step

    def check(self, state: TrainState) -> int | None:
        """The step that ``load`` would restore into ``state``, after all its refusals of another model or corpus.

        Reads no weights, so ``state`` may hold tensors on the meta device; its loader and schedule are moved.
        """
        commit = self._newest_before(None)
        if commit is not None:
            described = self._described(state)
            together(lambda: self._fit(commit, state, described) and None)
        return None if commit is None else commit.step

    def load(self, state: TrainState, step: int | None = None) -> int:
        """Restores ``step``, or the newest intact one, into ``state``; returns the step.

        No weight is overwritten before all of it has been verified on all ranks. Raises ``StorageError`` for
        what is missing or damaged and names the newest intact earlier step; ``ConfigError`` for a checkpoint
        of another model, optimizer or corpus.
        """
        commit = self._newest_before(None, tell=True) if step is None else self._intact(step)
        if commit is None:
            raise StorageError(f"no checkpoint in {self._directory.root}; start without --resume, or correct run.dir")
        described = self._described(state)
        together(lambda: self._restore(commit, state, described))
        state.step = commit.step
        return commit.step

    def _described(self, state: TrainState) -> dict[str, Any]:
        """Names of the whole model, and the optimizer without its tensors, from the ranks that hold them."""
        return join(together(lambda: describe(state.optimizer, live_tensors(state.model))))

    def _write(self, step: int, state: TrainState, described: dict[str, Any]) -> dict[str, list[Any]]:
        """This rank's files; returns their records as plain values."""
        rank, directory = this_rank(), self._directory.partial(step)
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
            rest = manifest.plain(
                {
                    "step": step,
                    "optimizer": {key: described[key] for key in ("state", "groups")},
                    "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
                    "loader": None if state.loader is None else state.loader.state_dict(),
                    "layout": self._layout,
                    "config": self._config,
                },
                "the state of the run",
            )
            records[manifest.STATE] = write_new(directory / manifest.STATE, [manifest.encode(rest)])
        return {name: [item.sha256, item.bytes] for name, item in records.items()}

    def _commit(self, step: int, written: list[dict[str, list[Any]]]) -> None:
        files = {name: FileRecord(*item) for records in written for name, item in records.items()}
        record = manifest.encode_commit(Commit(step, world_size(), files))
        write_new(self._directory.partial(step) / manifest.COMMIT, [record])
        self._directory.commit(step)

    def _newest_before(self, limit: int | None, tell: bool = False) -> Commit | None:
        """The newest step below ``limit`` that is intact on all ranks; ``tell`` reports the damaged ones above it."""
        views = together(self._directory.steps)
        if any(view != views[0] for view in views) and this_rank() == 0:
            _log.warning("ranks see different checkpoints in %s: %s", self._directory.root, views)
        common = sorted(set.intersection(*map(set, views)), reverse=True)
        damage: dict[int, str] = {}
        for step in [step for step in common if limit is None or step < limit]:
            try:
                found = self._verify(step)
            except StorageError as error:
                damage[step] = str(error)
                self._damaged.add(step)
                continue
            # Only now: where nothing is intact, the error below says it all.
            for broken, why in damage.items() if tell and this_rank() == 0 else ():
                _log.warning("step %d is left out: %s", broken, why)
            return found
        if damage and limit is None:
            newest = damage[max(damage)]
            raise StorageError(
                f"none of {len(damage)} checkpoints in {self._directory.root} is intact; newest: {newest}"
            )
        return None

    def _intact(self, step: int) -> Commit:
        try:
            return self._verify(step)
        except StorageError as error:
            earlier = self._newest_before(step)
            found = f"step {earlier.step}" if earlier else "none"
            raise StorageError(f"cannot load step {step}: {error}; newest intact earlier one: {found}") from error

    def _verify(self, step: int) -> Commit:
        """Checks every file's hash, each on one rank, and that all ranks read the same record."""
        path = self._directory.path(step) / manifest.COMMIT
        commit: list[Commit] = []

        def check_share() -> str:
            if step not in self._directory.steps():
                raise StorageError(f"{path.parent} is no committed checkpoint")
            data = read_small(path, manifest.LIMIT_JSON)
            commit.append(manifest.decode_commit(data, str(path), step))
            for number, (name, record) in enumerate(sorted(commit[0].files.items())):
                if number % world_size() == this_rank():
                    self._check_once(path.parent / name, record)
            return hashlib.sha256(data).hexdigest()

        if len(set(together(check_share))) > 1:
            raise StorageError(f"{path} differs between ranks: all of them must see one shared directory")
        return commit[0]

    def _check_once(self, path: Path, record: FileRecord) -> None:
        """``newest`` and ``load`` after it hash an untouched file once."""
        try:
            info = os.lstat(path)
        except OSError as error:
            raise StorageError(f"{path} is missing: {error.strerror or error}") from error
        stamp = (record, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if self._checked.get(path) != stamp:
            check_file(path, record)
            self._checked[path] = stamp

    def _restore(self, commit: Commit, state: TrainState, described: dict[str, Any]) -> None:
        located, rest, tensors, optimizer = self._fit(commit, state, described)
        generators = self._generators(commit, located, rest)
        read_shards(tensors, {name: located[name] for name in tensors})
        state.optimizer.load_state_dict(optimizer)
        if generators is not None:
            set_rng_state(generators)
        # Earlier checkpoints kept only a digest, which cannot say what has changed.
        changed = changed_keys(rest["config"], self._config) if type(rest["config"]) is dict else []
        if changed and this_rank() == 0:
            _log.warning(
                "step %d was written under another configuration; from here on: %s", commit.step, ", ".join(changed)
            )

    def _fit(
        self, commit: Commit, state: TrainState, described: dict[str, Any]
    ) -> tuple[dict[str, list[Located]], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """Shards, plain state, tensors to fill and the optimizer's state around them; all that is refused, is here."""
        directory = self._directory.path(commit.step)
        live = live_tensors(state.model)
        located = _with_copies(locate(_read_manifests(directory, commit)), live)
        rest = _read_state(directory, commit)
        first = {name: shards[0][1] for name, shards in located.items() if not name.startswith("rng.")}
        tensors = model_tensors(live)
        check_tensors("model.", tensors, {f"model.{name}" for name in described["model"]}, first, str(directory))
        targets, optimizer = optimizer_targets(
            state.optimizer, live, rest["optimizer"], described, first, str(directory / manifest.STATE)
        )
        check_tensors("optimizer.", targets, saved_tensors(rest["optimizer"]), first, str(directory))
        tensors |= targets
        for name in ("loader", "scheduler"):
            _restore_plain(name, getattr(state, name), rest[name], directory)
        return located, rest, tensors, optimizer

    def _generators(
        self, commit: Commit, located: Mapping[str, list[Located]], rest: Mapping[str, Any]
    ) -> dict[str, Tensor] | None:
        """The random generators that this rank saved, if the layout is the one that it saved them on."""
        if (commit.world, rest["layout"]) != (world_size(), self._layout):
            if this_rank() == 0:
                _log.warning(
                    "random generators start afresh: step %d was saved by %d ranks with %s, now %d with %s",
                    *(commit.step, commit.world, rest["layout"], world_size(), self._layout),
                )
            return None
        prefix = f"rng.{this_rank()}."
        states = {
            name.removeprefix(prefix): read_whole(shards) for name, shards in located.items() if name.startswith(prefix)
        }
        current = rng_state()["cpu"]
        saved = states.get("cpu")
        if saved is None or (saved.dtype, saved.shape) != (current.dtype, current.shape):
            raise StorageError(f"{self._directory.path(commit.step)} is damaged: no {prefix}cpu of this torch")
        return states


def _read_manifests(directory: Path, commit: Commit) -> dict[Path, list[Chunk]]:
    """Every rank's shards, by file, after all checks; the manifests' hashes have been checked."""
    chunks: dict[Path, list[Chunk]] = {}
    for rank in range(commit.world):
        path = directory / manifest.manifest_file(rank)
        size = commit.files[manifest.shard_file(rank)].bytes
        data = read_small(path, manifest.LIMIT_JSON)
        chunks[directory / manifest.shard_file(rank)] = manifest.decode_manifest(data, str(path), rank, size)
    manifest.check_coverage((chunk for inside in chunks.values() for chunk in inside), str(directory))
    return chunks


def _with_copies(located: dict[str, list[Located]], live: Mapping[str, Tensor]) -> dict[str, list[Located]]:
    """``located`` with entries for this rank's copies of tied weights, which read what the original reads."""
    for copy in [name for name in live if COPY in name]:
        original = copy.removesuffix(COPY)
        for name in list(located):
            if name == f"model.{original}" or name.startswith(f"optimizer.{original}."):
                located[name.replace(original, copy, 1)] = located[name]
    return located


def _read_state(directory: Path, commit: Commit) -> dict[str, Any]:
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
