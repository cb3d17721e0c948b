"""Bytes and memory of tree attention."""

from __future__ import annotations

from longctx.attention.costs.estimate import Costs, Peak, Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Returns what a rank sends.

    Forward, its queries to each rank whose keys they see, and (out, lse) of others' queries to their owners. Backward,
    q, dout, out and lse, and dq.
    """
    others = [other for other in range(plan.world) if other != rank]
    visiting = [len(plan.sees(rank, other)) for other in others]
    visited = [len(plan.sees(other, rank)) for other in others]
    leaving, returned = sum(visiting), sum(visited)
    hosts, guests = sum(map(bool, visiting)), sum(map(bool, visited))
    gradient = sizes.queries if sizes.options.grad_dtype == "compute" else sizes.query_gradients
    return Volume(
        leaving * sizes.queries + returned * (sizes.query_gradients + sizes.lse),
        leaving * (3 * sizes.queries + sizes.lse) + returned * gradient,
        hosts + 2 * guests,
        4 * hosts + guests,
    )


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes.

    It counts results; visiting queries at hand and coming, and copies of own queries that visit a rank in part. Then
    results of visiting queries, and those of the step before in flight.
    """
    rows, world, compute = plan.shard, plan.world, sizes.options.grad_dtype == "compute"
    partial, dq = sizes.held(outputs=1, sums=1), sizes.held(outputs=1)
    result = sizes.held(queries=1) if compute else dq
    forward, backward = rows * sizes.held(queries=1), rows * sizes.held(queries=1, keys=1)  # results in their dtype
    for rank in range(world):
        guests = [0, *(len(plan.sees((rank - step) % world, rank)) for step in range(1, world)), 0]
        visits = [0, *(len(plan.sees(rank, (rank + step) % world)) for step in range(1, world)), 0]
        for step in range(world):
            copied = visits[step + 1] if visits[step + 1] < rows else 0
            visitors = guests[step] + guests[step + 1] + copied
            before = guests[step - 1] + visits[step - 1] if step else 0
            returning = guests[step] + visits[step] + before
            merging = 2 * visits[step - 1] * sizes.lse if step else 0
            forward = max(forward, visitors * sizes.held(queries=1) + returning * partial + merging)
            shares = returning * result + guests[step] * dq if compute else returning * dq
            backward = max(backward, visitors * sizes.held(queries=3, sums=1) + shares)
    return Peak(rows * partial + forward, rows * sizes.held(queries=1, outputs=1, sums=1, gradients=1) + backward)


COSTS = Costs(volume, peak_memory)
