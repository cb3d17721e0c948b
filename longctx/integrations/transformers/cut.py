"""A batch of ``transformers`` after its one cut: what this rank's model reads, and the plans of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longctx.sequence import SequencePlan

if TYPE_CHECKING:
    from longctx.integrations.transformers.sharing import SharedSequence

PLAN = "longctx"  # the argument by which the cut passes through a model to its attention layers


@dataclass(frozen=True, eq=False)
class CutBatch:
    """Holds one rank's part of a batch; ``T`` is the shard length.

    ``input_ids``, ``labels``, ``position_ids``: int64 ``[B, T]``; labels are shifted already, positions global.
    ``count``: labels of all ranks of the group. ``plan``: of layers without a window. ``plans``: by each layer's
    window. ``sequence``: who has cut it.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    count: int
    plan: SequencePlan
    plans: Mapping[int | None, SequencePlan]
    sequence: SharedSequence

    @property
    def inputs(self) -> dict[str, Any]:
        """Returns what the model is called with: ``model(**cut.inputs)``. Labels are not among it."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False, PLAN: self}
