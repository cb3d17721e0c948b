"""Bytes and memory of ring attention, over the rows that its schedule carries."""

from __future__ import annotations

from dataclasses import astuple

from longctx.attention.costs.estimate import Costs, Peak, Sent, Volume, summed
from longctx.attention.costs.memory import alive_on_way, blocks_alive
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import RingSchedule, SequencePlan, key_ring


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Returns what a rank sends, by receiver.

    Forward, keys and values of the rows that it passes on. Backward, those once more, and dk and dv of every row that
    it held for others, passed on, returned to their owner, or both.
    """
    schedule, direct = key_ring(plan), sizes.options.grad_dtype == "compute"
    block, gradients = 2 * sizes.keys, 2 * (sizes.keys if direct else sizes.key_gradients)
    passed = [(to, len(rows) * block) for to, rows in schedule.block_messages(rank)]
    returned = [(to, len(rows) * gradients) for to, rows in schedule.gradient_messages(rank, direct)]
    return [
        *((to, Volume(size, size, 1, 1)) for to, size in passed),
        *((to, Volume(0, size, 0, 1)) for to, size in returned),
    ]


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes."""
    return keys_peak(plan, key_ring(plan), sizes)


def keys_peak(plan: SequencePlan, schedule: RingSchedule, sizes: Sizes) -> Peak:
    """Returns the peak memory of a ring of keys under ``schedule``, in bytes, on the rank with most.

    It is that of the passes, or of results in their own dtype beside those in the accumulation dtype. Backward includes
    what was saved.
    """
    rows, passes = plan.shard, keys_alive(plan, schedule, sizes)
    return Peak(
        max(passes.forward, rows * sizes.held(queries=1, outputs=1, sums=1)),
        rows * sizes.held(queries=1, sums=1)
        + max(passes.backward, rows * sizes.held(queries=1, outputs=1, keys=1, gradients=1)),
    )


def keys_alive(plan: SequencePlan, schedule: RingSchedule, sizes: Sizes) -> Peak:
    """Returns what each pass allocates, in bytes, on the rank with most: results, blocks in memory, and gradients."""
    rows, direct = plan.shard, sizes.options.grad_dtype == "compute"
    block, wide = sizes.held(keys=1), sizes.held(gradients=1)
    result = block if direct else wide
    forward = backward = 0
    for rank in range(schedule.world):
        blocks = blocks_alive(schedule, rank)
        forward = max(forward, max(blocks) * block)
        for here, moments in zip(blocks, alive_on_way(schedule, rank, direct, sizes), strict=True):
            most = max(summing * wide + returning * result for summing, returning in astuple(moments))
            backward = max(backward, here * block + most)
    return Peak(
        rows * sizes.held(outputs=1, sums=1) + forward,
        rows * sizes.held(outputs=1, gradients=1) + backward,
    )


COSTS = Costs(summed(sends), peak_memory, sends)
