"""What the ring sends and keeps in memory, over the rows that its rotation carries."""

from __future__ import annotations

from dataclasses import astuple

from longctx.attention.costs.estimate import Costs, Peak, Sent, Volume, summed
from longctx.attention.costs.memory import alive_on_way, blocks_alive
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import RingSchedule, SequencePlan, key_ring


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Keys and values of the rows that a rank passes on, in the backward pass once more, and dk and dv of every row
    it has held for others, passed on, sent home, or both.
    """
    rotation, direct = key_ring(plan), sizes.options.grad_dtype == "compute"
    block, gradients = 2 * sizes.keys, 2 * (sizes.keys if direct else sizes.key_gradients)
    passed = [(to, len(rows) * block) for to, rows in rotation.leaving(rank)]
    returned = [(to, len(rows) * gradients) for to, rows in rotation.returning(rank, direct)]
    return [
        *((to, Volume(size, size, 1, 1)) for to, size in passed),
        *((to, Volume(0, size, 0, 1)) for to, size in returned),
    ]


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """What keys around the plan's ring take."""
    return keys_peak(plan, key_ring(plan), sizes)


def keys_peak(plan: SequencePlan, rotation: RingSchedule, sizes: Sizes) -> Peak:
    """Of the passes, or results in their own dtype beside those in which they were summed; backward what was saved."""
    rows, passes = plan.shard, keys_alive(plan, rotation, sizes)
    return Peak(
        max(passes.forward, rows * sizes.held(queries=1, outputs=1, sums=1)),
        rows * sizes.held(queries=1, sums=1)
        + max(passes.backward, rows * sizes.held(queries=1, outputs=1, keys=1, gradients=1)),
    )


def keys_alive(plan: SequencePlan, rotation: RingSchedule, sizes: Sizes) -> Peak:
    """What each pass makes: results as they are summed, blocks at hand and on their way, and their gradients. Of the
    rank with most."""
    rows, direct = plan.shard, sizes.options.grad_dtype == "compute"
    block, wide = sizes.held(keys=1), sizes.held(gradients=1)
    home = block if direct else wide
    forward = backward = 0
    for rank in range(rotation.world):
        blocks = blocks_alive(rotation, rank)
        forward = max(forward, max(blocks) * block)
        for here, moments in zip(blocks, alive_on_way(rotation, rank, direct, sizes), strict=True):
            most = max(on_way * wide + going * home for on_way, going in astuple(moments))
            backward = max(backward, here * block + most)
    return Peak(
        rows * sizes.held(outputs=1, sums=1) + forward,
        rows * sizes.held(outputs=1, gradients=1) + backward,
    )


COSTS = Costs(summed(sends), peak_memory, sends)
