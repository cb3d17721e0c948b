"""Bytes and memory of TokenRing."""

from __future__ import annotations

from dataclasses import astuple

from longctx.attention.costs.burst import queries_peak
from longctx.attention.costs.estimate import Costs, Peak, Volume
from longctx.attention.costs.memory import alive_on_way, blocks_alive
from longctx.attention.runtime.ring_transport import count_rows
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan, query_ring
from longctx.sequence.tiles import query_rows


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Returns what a rank sends: queries on, and (out, lse) to owners; backward four tensors on, and dq to owners."""
    passed, blocks = count_rows(query_ring(plan).block_messages(rank))
    returned, shares = count_rows(query_ring(plan).gradient_messages(rank, direct=True))
    result = sizes.queries if sizes.options.grad_dtype == "compute" else sizes.query_gradients
    return Volume(
        passed * sizes.queries + returned * (result + sizes.lse),
        passed * 2 * (sizes.queries + sizes.lse) + returned * result,
        blocks + 2 * shares,
        2 * blocks + shares,
    )


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes.

    It counts the local (out, lse), what is needed to merge into it, blocks of queries, and (out, lse) at hand and in
    flight.
    """
    rows, schedule, compute = plan.shard, query_ring(plan), sizes.options.grad_dtype == "compute"
    wide, result = sizes.held(outputs=1, sums=1), sizes.held(1, sums=1) if compute else sizes.held(outputs=1, sums=1)
    forward = rows * sizes.held(queries=1)
    for rank in range(plan.world):
        merging = sizes.held(outputs=int(compute), sums=2) * _merged_at_once(plan, rank)
        for blocks, moments in zip(
            blocks_alive(schedule, rank), alive_on_way(schedule, rank, True, sizes), strict=True
        ):
            for (summing, returning), beside in zip(astuple(moments), (0, 0, 0, merging), strict=True):
                alive = blocks * sizes.held(queries=1) + summing * wide + returning * result
                forward = max(forward, round(alive + beside))
    return Peak(rows * wide + forward, queries_peak(plan, schedule, sizes, direct=True))


def _merged_at_once(plan: SequencePlan, rank: int) -> float:
    """Returns the most rows, over the whole batch, that are merged at once; batch rows that differ are merged apart."""
    returned = (tiles for holder in range(plan.world) if holder != rank for tiles in plan.tiles(rank, holder))
    merged = (
        (stop - start) * (tiles.batch_stop - tiles.batch_start)
        for tiles in returned
        for start, stop in query_rows([tiles]).intervals
    )
    return max(merged, default=0) / len(plan.documents)


COSTS = Costs(volume, peak_memory)
