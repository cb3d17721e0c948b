"""What the double ring sends and keeps in memory, whichever side goes round in its backward pass."""

from __future__ import annotations

from dataclasses import astuple

from longctx.attention.costs.estimate import Costs, Peak, Sent, Volume, summed
from longctx.attention.costs.memory import alive_on_way, blocks_alive
from longctx.attention.costs.ring import keys_peak
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.burst import route_of, side_of
from longctx.sequence import RingSchedule, SequencePlan, key_ring, query_ring


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Keys and values of the rows that a rank passes on; backward, those of the side that travels, and gradients."""
    side = side_of(plan, sizes)
    rotation, block, gradients = route_of(plan, side, sizes)
    tensors = 1 if side == "kv" else 2
    passed = key_ring(plan, sizes.inner).leaving(rank)
    returned = rotation.returning(rank, sizes.options.grad_dtype == "compute")
    return [
        *((to, Volume(2 * len(rows) * sizes.keys, 0, 1, 0)) for to, rows in passed),
        *((to, Volume(0, len(rows) * block, 0, tensors)) for to, rows in rotation.leaving(rank)),
        *((to, Volume(0, len(rows) * gradients, 0, 1)) for to, rows in returned),
    ]


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """As the ring around the same route; backward of the side that travels."""
    keys = keys_peak(plan, key_ring(plan, sizes.inner), sizes)
    if side_of(plan, sizes) == "kv":
        return keys
    direct = sizes.options.grad_dtype == "compute"
    return Peak(keys.forward, queries_peak(plan, query_ring(plan, sizes.inner), sizes, direct))


def queries_peak(plan: SequencePlan, rotation: RingSchedule, sizes: Sizes, direct: bool) -> int:
    """Backward, on the rank with most: out and lse; dq, dk and dv; blocks of (Q, dO, lse, delta), their dq, and the
    stand-in for out. ``direct``: as ``pass_queries_backward`` is told, in whatever dtype."""
    rows, block, wide = plan.shard, sizes.held(queries=2, sums=2), sizes.held(outputs=1)
    home = sizes.held(queries=1) if sizes.options.grad_dtype == "compute" else wide
    most = rows * max(sizes.held(outputs=3), sizes.held(queries=1, keys=1))  # delta; results in their dtype
    for rank in range(rotation.world):
        blocks = blocks_alive(rotation, rank)
        for hop, moments in enumerate(alive_on_way(rotation, rank, direct, sizes)):
            here = len(rotation.carried(rotation.owner(rank, hop), hop))
            stand_in = (0, here * sizes.held(outputs=2, sums=2), here * sizes.held(queries=1)) if hop else (0, 0, 0)
            for (on_way, going), beside in zip(astuple(moments), stand_in, strict=True):
                most = max(most, blocks[hop] * block + on_way * wide + going * home + beside)
    return rows * sizes.held(queries=1, outputs=1, sums=1, gradients=1) + most


COSTS = Costs(summed(sends), peak_memory, sends)
