"""What USP sends and keeps in memory: swaps inside rows, and the ring across them."""

from __future__ import annotations

from dataclasses import replace

from longctx.attention.costs import ring
from longctx.attention.costs.all_to_all import peak_in_rows, swap_sends
from longctx.attention.costs.estimate import Costs, Peak, Sent, summed
from longctx.attention.runtime.head_sharding import HeadGroups
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan, key_ring


def sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """What the row's exchanges send, and the ring of the column with this rank's share of the heads."""
    inner = sizes.inner
    groups = HeadGroups.of(sizes.heads, sizes.kv_heads, inner)
    row, column = divmod(rank, inner)
    across = []
    for group in range(groups.count):
        keys = groups.split.local_keys(groups.part(column, group))
        own = replace(sizes, heads=groups.split.queries, kv_heads=keys, inner=1)
        across += [(to * inner + column, sent) for to, sent in ring.sends(plan.joined(inner), row, own)]
    return [*swap_sends(plan, rank, sizes), *across]


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """What swaps around the ring of rows take."""
    return peak_in_rows(plan, sizes, lambda rows, own: ring.keys_alive(rows, key_ring(rows), own))


COSTS = Costs(summed(sends), peak_memory, sends)
