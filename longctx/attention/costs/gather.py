"""Bytes and memory of gathering keys and values."""

from __future__ import annotations

from longctx.attention.costs.estimate import Costs, Peak, Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.gather import head_groups
from longctx.sequence import SequencePlan, gathered_keys


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Returns what a rank sends.

    Forward, its keys and values to each rank that sees them. Backward, those once more, and dk and dv of all keys of
    others that it saw.
    """
    ranks = [other for other in range(plan.world) if other != rank]
    sent = [len(plan.reads(other, rank)) for other in ranks]
    seen = [len(plan.reads(rank, other)) for other in ranks]
    groups = len(head_groups(sizes.heads, sizes.kv_heads))
    gradient = sizes.keys if sizes.options.grad_dtype == "compute" else sizes.key_gradients
    forward_bytes = 2 * sum(sent) * sizes.keys
    messages = groups * sum(map(bool, sent))
    return Volume(
        forward_bytes,
        forward_bytes + 2 * sum(seen) * gradient,
        messages,
        messages + groups * sum(map(bool, seen)),
    )


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes.

    Of each group of heads it counts the keys in order, what they came in and what was sent. These two it counts of the
    next group too. Backward, their gradients, and those of the group before in flight.
    """
    rows, world = plan.shard, plan.world
    part = 1 / len(head_groups(sizes.heads, sizes.kv_heads))
    forward, backward = rows * sizes.held(queries=1), rows * sizes.held(queries=1, keys=1)  # results in their dtype
    for rank in range(world):
        others = [other for other in range(world) if other != rank]
        own, seen = len(plan.reads(rank, rank)), [len(plan.reads(rank, other)) for other in others]
        sent = sum(len(reads) for reads in {plan.reads(other, rank) for other in others})
        asked, here = sum(len(plan.reads(other, rank)) for other in others), sum(seen) + own
        keys, picked = here + sum(seen) + sent, max([own, *seen])
        following = sum(seen) + sent if part < 1 else 0
        forward = max(forward, sizes.held(keys=(keys + following) * part))
        compute, returning = sizes.options.grad_dtype == "compute", sum(seen) + asked
        summed = here + (picked if compute else own)  # a rank's share is picked, then converted, one after another
        if not gathered_keys(plan, rank).places.in_runs:
            summed += picked
        if compute:
            keys, returning = keys + returning, 0
        backward = max(backward, sizes.held(keys=keys * part, gradients=(summed + returning) * part))
    return Peak(
        rows * sizes.held(outputs=1, sums=1) + forward,
        rows * sizes.held(queries=1, outputs=1, sums=1, gradients=1) + backward,
    )


COSTS = Costs(volume, peak_memory)
