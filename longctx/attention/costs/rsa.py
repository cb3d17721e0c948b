"""Bytes and memory of ring self-attention."""

from __future__ import annotations

from longctx.attention.costs.estimate import Costs, Peak, Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.rsa import shard_lengths
from longctx.sequence import SequencePlan


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Returns what a rank sends.

    All blocks but the next rank's, in two rings forward and three backward. Of all blocks but its own, the gradients of
    k and of v.
    """
    held = [shard_lengths(plan)[(rank - hop) % plan.world] for hop in range(plan.world)]
    passed, returned = held[:-1], held[1:]
    return Volume(
        2 * sum(passed) * sizes.keys,
        3 * sum(passed) * sizes.keys + 2 * sum(returned) * sizes.key_gradients,
        2 * sum(map(bool, passed)),
        3 * sum(map(bool, passed)) + 2 * sum(map(bool, returned)),
    )


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory in bytes.

    Forward, whole rows of scores beside those of one block, or beside the mask, the output and what enters it.
    Backward, weights, their gradients and the product of both.
    """
    rows = plan.shard
    scores, mask = rows * plan.length * sizes.lse, sizes.batch * rows * plan.length
    keys = rows * (sizes.key_gradients + 2 * sizes.keys)  # of one block as it is computed with, at hand and coming
    one_block = scores // plan.world + rows * sizes.held(outputs=1) + keys
    output = max(mask + rows * sizes.held(outputs=3, sums=2), keys + rows * sizes.held(outputs=2, sums=1))
    return Peak(
        scores + max(one_block, output) + sizes.batch * rows,
        3 * scores + rows * sizes.held(queries=2, outputs=4, sums=2, gradients=2),
    )


COSTS = Costs(volume, peak_memory)
