"""Bytes and memory of USP: all-to-alls inside rows of the grid, and the ring across them."""

from __future__ import annotations

from dataclasses import replace

from longctx.attention.costs import ring
from longctx.attention.costs.all_to_all import all_to_all_sends, peak_in_rows
from longctx.attention.costs.estimate import Costs, Peak, Sent, summed
from longctx.attention.runtime.head_sharding import HeadGroups
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan, key_ring


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Returns what a rank sends, by receiver: in all-to-alls of its row, and in the ring of its column.

    The ring carries this rank's share of the heads.
    """
    inner = sizes.inner
    groups = HeadGroups.of(sizes.heads, sizes.kv_heads, inner)
    row, column = divmod(rank, inner)
    across = []
    for group in range(groups.count):
        keys = groups.split.local_keys(groups.part(column, group))
        own = replace(sizes, heads=groups.split.queries, kv_heads=keys, inner=1)
        across += [(to * inner + column, sent) for to, sent in ring.sends(plan.joined(inner), row, own)]
    return [*all_to_all_sends(plan, rank, sizes), *across]


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes: all-to-alls before and after the ring."""
    return peak_in_rows(plan, sizes, lambda rows, own: ring.keys_alive(rows, key_ring(rows), own))


COSTS = Costs(summed(sends), peak_memory, sends)
