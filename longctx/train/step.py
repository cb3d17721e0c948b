"""Takes one optimizer step: the loss is a global sum over a global count, and every decision is made by all ranks.

    count   = valid tokens of all micro-batches of all ranks
    grad    = sum over ranks and micro-batches of d(local loss sum) / count
    norm    = global norm of grad;  grad *= min(1, clip / norm)
    update, unless loss or norm is not finite, or no token was valid

A rank without valid tokens takes part in all of it and adds zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longctx.comm.rank_numbers import gather_numbers
from longctx.engines import Engine
from longctx.errors import NumericsError
from longctx.mesh import Mesh
from longctx.sequence import LocalBatch

# An overflow now and then is survived by skipping its update; more in a row is a run that has diverged.
SKIPPED_IN_A_ROW = 3
_NORM_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class StepResult:
    """Tells what an optimizer step came to, equal on all ranks.

    ``loss``: per valid token of the whole global batch; None when there was none. ``grad_norm``: before
    clipping. ``skipped``: the update was left out, because a number was not finite or no token was valid.
    """

    loss: float | None
    grad_norm: float
    valid_tokens: int
    skipped: bool


class TrainStep:
    """Takes optimizer steps that all ranks decide alike.

    ``mesh``: who holds which tokens. ``grad_clip``: largest global norm, None for any. ``before_update``: is called
    when gradients are known and nothing is changed yet. ``skipped_in_a_row``: steps until now that were not finite.
    """

    def __init__(self, engine: Engine, mesh: Mesh, device: torch.device, grad_clip: float | None = None) -> None:
        self.engine = engine
        self.skipped = 0
        self._mesh = mesh
        self._device = device
        self._grad_clip = grad_clip
        self.skipped_in_a_row = 0
        self.before_update: Callable[[], None] = _nothing

    def __call__(self, batches: Sequence[LocalBatch], lr: float, step: int = 0) -> StepResult:
        """Takes one step on this rank's micro-batches; ``step`` is its name in messages."""
        result = self.gradients(batches)
        finite = math.isfinite(result.grad_norm) and (result.loss is None or math.isfinite(result.loss))
        self.before_update()
        if result.skipped:
            self.engine.discard()
        else:
            self.engine.update(lr, self._coefficient(result.grad_norm))
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"step {step}: loss {result.loss} and gradient norm {result.grad_norm} must be finite, and "
                f"were not in {SKIPPED_IN_A_ROW} steps in a row; lower optim.lr, or raise optim.warmup_steps"
            )
        return result

    def gradients(self, batches: Sequence[LocalBatch]) -> StepResult:
        """Computes the step's gradients, unclipped, and leaves them in the engine."""
        valid = sum(batch.valid_tokens for batch in batches)
        count = int(sum(row[0] for row in gather_numbers([valid], self._mesh.token_group, self._device)))
        loss = self.engine.accumulate(batches, 1.0 / max(count, 1))
        # Ranks with the same tokens of one stage have the same loss, and different parts of the gradient.
        own_loss = loss.double() if self._mesh.leads_tensor else torch.zeros_like(loss, dtype=torch.float64)
        own = torch.stack([own_loss, self.engine.squared_norm()]).tolist()
        losses, squares = zip(*gather_numbers(own, self._mesh.world_group, self._device), strict=True)
        mean = sum(losses) / count if count else None
        norm = math.sqrt(sum(squares))  # of NaN it is NaN, of infinity infinity
        finite = math.isfinite(norm) and (mean is None or math.isfinite(mean))
        return StepResult(mean, norm, count, skipped=not finite or not count)

    def _coefficient(self, norm: float) -> float:
        if self._grad_clip is None:
            return 1.0
        return min(1.0, self._grad_clip / (norm + _NORM_EPSILON))


def _nothing() -> None:
    pass
