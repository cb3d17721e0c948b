"""Saves and restores the whole state of a run: sharded, hashed, committed by one rename, readable on any layout.

    checkpointer = Checkpointer(run_dir / "checkpoints", keep=3, layout={"sp": 4, "dp_shard": 1})
    checkpointer.save(step, TrainState(model, optimizer, scheduler, loader, step))
    checkpointer.load(state)                 # the newest that is intact; returns its step

Every rank calls every method. All ranks must see the same directory, as on a shared file system. No method
unpickles, and ranks exchange nothing but tensors. Files are written in ``saving.py``, verified in ``intact.py`` and
read in ``restoring.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longctx.checkpoint.agreement import run_on_all_ranks, this_rank
from longctx.checkpoint.directory import CheckpointDirectory
from longctx.checkpoint.intact import IntactSteps
from longctx.checkpoint.manifest import Commit
from longctx.checkpoint.restoring import plan_load, restore
from longctx.checkpoint.saving import write_commit, write_rank
from longctx.checkpoint.state import describe, describe_together, join
from longctx.checkpoint.train_state import RunRecord, StateAtRest, TrainState
from longctx.checkpoint.trust import Trust
from longctx.errors import NumericsError, StorageError

__all__ = ["Checkpointer", "TrainState"]


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
        self._intact = IntactSteps(self._directory)
        self._keep = keep
        self._run = RunRecord.of(layout, config)
        self._trust = Trust()

    def save(self, step: int, state: TrainState | StateAtRest, *, doubtful: bool = False) -> Path:
        """Writes and commits ``step``, then deletes what ``keep`` leaves over.

        ``doubtful``: the latest step on these weights was not finite; nothing is deleted for them. Raises
        ``StorageError`` on every rank when any rank's disk refuses, ``NumericsError`` when any rank's tensors are not
        finite; earlier checkpoints stay intact.
        """
        rest = StateAtRest.of(state) if isinstance(state, TrainState) else state
        partial = self._directory.partial(step)
        try:
            run_on_all_ranks(lambda: self._directory.begin(step) if this_rank() == 0 else None)
            described = join(run_on_all_ranks(lambda: describe(rest.optimizer, rest.live)))
            written = run_on_all_ranks(lambda: write_rank(partial, step, rest, described, self._run))
            run_on_all_ranks(lambda: self._commit(step, written) if this_rank() == 0 else None)
        except (StorageError, NumericsError) as error:
            if this_rank() == 0:
                self._directory.abandon(step)
            if isinstance(error, NumericsError):
                raise
            raise StorageError(f"step {step} was not saved, earlier ones are intact: {error}") from error
        self._intact.damaged.discard(step)
        self._trust.saved(step)
        if not doubtful:
            self._prune(step)
        return self._directory.path(step)

    @property
    def latest(self) -> int | None:
        """Returns the step that this process saved or loaded last."""
        return self._trust.latest

    def confirm(self) -> None:
        """Notes that a step on the latest checkpoint's weights, or on later ones, came out finite."""
        if self._trust.confirm() and self._keep == 1:
            self._prune(self._trust.confirmed)

    def distrust(self) -> str:
        """Sets aside what this process saved and no finite step confirmed; returns which step to go on from, in words.

        A run that has diverged calls it: its newest weights may be ruined although their numbers are finite.
        """
        aside = self._trust.doubtful()
        if this_rank() == 0:
            for step in aside:
                self._directory.set_aside(step)
        left = [step for step in self._directory.steps() if step not in aside]
        return self._trust.advice(left, aside)

    def _prune(self, step: int | None) -> None:
        if this_rank() == 0 and step is not None:
            self._directory.prune(self._keep, step, self._intact.damaged, self._trust.confirmed)

    def newest(self) -> int | None:
        """Finds the newest committed step that is intact, by reading it; None where there is none at all.

        Says nothing of damaged ones, for ``load`` will. Raises ``StorageError`` when there are checkpoints but
        none is intact: starting over would lose them.
        """
        found = self._intact.newest()
        return None if found is None else found.step

    def any_committed(self) -> bool:
        """Tells whether any rank sees a committed step, intact or not; all ranks return the same."""
        return any(run_on_all_ranks(self._directory.steps))

    def check(self, state: TrainState, step: int | None = None) -> int | None:
        """Finds the step that ``load`` would restore into ``state``, after all its refusals of another run's.

        Reads no weights, so ``state`` may hold tensors on the meta device; its loader and schedule are moved. Of files
        of weights it compares only the sizes: their hashes are for ``load`` to check, which reads them.
        """
        commit = self._intact.newest(hashed=False) if step is None else self._intact.exactly(step, hashed=False)
        if commit is None:
            return None
        described = describe_together(state.model, state.optimizer)
        directory = self._directory.path(commit.step)
        run_on_all_ranks(lambda: plan_load(directory, commit, state, described, self._run) and None)
        return commit.step

    def load(self, state: TrainState, step: int | None = None) -> int:
        """Restores ``step``, or the newest intact one, into ``state``; returns the step.

        No weight is overwritten before all of it has been verified on all ranks. Raises ``StorageError`` for
        what is missing or damaged and names the newest intact earlier step; ``ConfigError`` for a checkpoint
        of another model, optimizer or corpus.
        """
        commit = self._intact.newest(tell=True) if step is None else self._intact.exactly(step)
        if commit is None:
            raise StorageError(f"no checkpoint in {self._directory.root}; start without --resume, or correct run.dir")
        described = describe_together(state.model, state.optimizer)
        directory = self._directory.path(commit.step)
        run_on_all_ranks(lambda: restore(plan_load(directory, commit, state, described, self._run), state, self._run))
        state.step = commit.step
        self._trust.loaded(commit.step)
        return commit.step

    def _commit(self, step: int, written: list[dict[str, list[Any]]]) -> None:
        write_commit(self._directory.partial(step), step, written)
        self._directory.commit(step)

    def _verify(self, step: int) -> Commit:
        """Verifies one step; scripts that look for damage call it."""
        return self._intact.verified(step)
