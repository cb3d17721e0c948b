"""Knows which checkpoints of this process may be gone on from: weights can be ruined and finite.

What an update did to the weights shows in the loss and the gradients of the step after it. So a checkpoint is
confirmed by a finite step on its weights or on later ones. Until then the confirmed one before it must stay.
"""

from __future__ import annotations

from collections.abc import Sequence


class Trust:
    """Follows one process's checkpoints, alike on all ranks."""

    def __init__(self) -> None:
        self.latest: int | None = None  # saved or loaded
        self.confirmed: int | None = None
        self._loaded: int | None = None
        self._saved: list[int] = []

    def saved(self, step: int) -> None:
        """Notes a checkpoint that this process wrote."""
        self.latest = step
        self._saved.append(step)

    def loaded(self, step: int) -> None:
        """Notes the checkpoint that this process goes on from; whether it is sound, its first step will show."""
        self.latest = self._loaded = step
        self.confirmed = None
        self._saved.clear()

    def confirm(self) -> bool:
        """Notes a finite step; returns whether it confirmed a checkpoint that was not yet."""
        if self.latest is None or self.latest == self.confirmed:
            return False
        self.confirmed = self.latest
        self._saved.clear()
        return True

    def doubtful(self) -> list[int]:
        """Lists what this process wrote and nothing has confirmed. What it loaded is not its own to judge."""
        return list(self._saved)

    def advice(self, left: Sequence[int], aside: Sequence[int]) -> str:
        """Says which step to go on from: ``left`` are committed, ``aside`` were until now."""
        told = [f"step {step} was written on the way and is set aside" for step in aside]
        if self.confirmed is not None and self.confirmed in left:
            told.append(f"--resume goes on from step {max(left)}")
        elif self._loaded is not None and self._loaded in left:
            earlier = [step for step in left if step < self._loaded]
            other = f"; --resume --step {max(earlier)} goes on from an earlier one" if earlier else ""
            told.append(f"no step on the weights of step {self._loaded}, which it went on from, was finite{other}")
        return "; ".join(told)
