"""Memory of attention of whole sequences, which sends nothing."""

from __future__ import annotations

from longctx.attention.costs.estimate import Costs, Peak, Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Returns a volume of nothing."""
    return Volume(0, 0, 0, 0)


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory in bytes.

    Forward, out as it is summed and as it is returned, and lse; backward the gradients in both dtypes.
    """
    rows = plan.shard
    return Peak(
        rows * sizes.held(queries=1, outputs=1, sums=1),
        rows * sizes.held(queries=2, outputs=1, sums=1, keys=1, gradients=1),
    )


def alive(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns what each pass allocates, in bytes: results in the accumulation dtype."""
    return Peak(plan.shard * sizes.held(outputs=1, sums=1), plan.shard * sizes.held(outputs=1, gradients=1))


COSTS = Costs(volume, peak_memory)
