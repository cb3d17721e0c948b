"""Bytes and memory of BurstAttention's double ring, whichever side rotates in the backward pass."""

from __future__ import annotations

from dataclasses import astuple

from longctx.attention.costs.estimate import Costs, Peak, Sent, Volume, summed
from longctx.attention.costs.memory import alive_on_way, blocks_alive
from longctx.attention.costs.ring import keys_peak
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.burst import schedule_of, side_of
from longctx.sequence import RingSchedule, SequencePlan, key_ring, query_ring


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Returns what a rank sends, by receiver.

    Forward, keys and values of the rows that it passes on. Backward, the rows of the side that rotates, and gradients.
    """
    side = side_of(plan, sizes)
    schedule, block, gradients = schedule_of(plan, side, sizes)
    tensors = 1 if side == "kv" else 2
    passed = key_ring(plan, sizes.inner).block_messages(rank)
    returned = schedule.gradient_messages(rank, sizes.options.grad_dtype == "compute")
    return [
        *((to, Volume(2 * len(rows) * sizes.keys, 0, 1, 0)) for to, rows in passed),
        *((to, Volume(0, len(rows) * block, 0, tensors)) for to, rows in schedule.block_messages(rank)),
        *((to, Volume(0, len(rows) * gradients, 0, 1)) for to, rows in returned),
    ]


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes: that of a ring over the same schedules."""
    keys = keys_peak(plan, key_ring(plan, sizes.inner), sizes)
    if side_of(plan, sizes) == "kv":
        return keys
    direct = sizes.options.grad_dtype == "compute"
    return Peak(keys.forward, queries_peak(plan, query_ring(plan, sizes.inner), sizes, direct))


def queries_peak(plan: SequencePlan, schedule: RingSchedule, sizes: Sizes, direct: bool) -> int:
    """Returns the peak memory of a backward pass in which queries rotate, in bytes, on the rank with most.

    It counts out and lse; dq, dk and dv; blocks of (q, dout, lse, delta), their dq, and the surrogate output.
    ``direct``: as ``pass_queries_backward`` is told, in whatever dtype.
    """
    rows, block, wide = plan.shard, sizes.held(queries=2, sums=2), sizes.held(outputs=1)
    result = sizes.held(queries=1) if sizes.options.grad_dtype == "compute" else wide
    most = rows * max(sizes.held(outputs=3), sizes.held(queries=1, keys=1))  # delta; results in their dtype
    for rank in range(schedule.world):
        blocks = blocks_alive(schedule, rank)
        for hop, moments in enumerate(alive_on_way(schedule, rank, direct, sizes)):
            here = len(schedule.carried(schedule.owner(rank, hop), hop))
            computing, after = here * sizes.held(outputs=2, sums=2), here * sizes.held(queries=1)
            surrogate = (0, computing, after, after) if hop else (0, 0, 0, 0)
            for (summing, returning), beside in zip(astuple(moments), surrogate, strict=True):
                most = max(most, blocks[hop] * block + summing * wide + returning * result + beside)
    return rows * sizes.held(queries=1, outputs=1, sums=1, gradients=1) + most


COSTS = Costs(summed(sends), peak_memory, sends)
