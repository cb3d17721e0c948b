"""USP: Ulysses inside the rows of a grid of ranks, a ring across its columns.

Fang, Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI" (2024).

    all-to-all in my row: q, k, v of my tokens and all heads  ->  of the row's tokens and my heads
    ring over my column, each row being one rank of it
    all-to-all in my row: out back to my tokens and all heads

A row holds the tokens of its ranks in order of position, under any layout; which of them the ring reads of another
row follows from that (``SequencePlan.joined``).
"""

from __future__ import annotations

import math
from dataclasses import replace

from longctx.attention.costs.memory_all_to_all import peak_in_rows
from longctx.attention.runtime.all_to_all import swapped
from longctx.attention.runtime.head_sharding import HeadGroups, swap_sends, work_in_rows
from longctx.attention.runtime.registry import AttentionCase, Peak, Sent, Sizes, Strategy, divisors, summed
from longctx.attention.strategies import ring
from longctx.sequence import SequencePlan


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


def peak(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Of swaps around the ring of rows."""
    return peak_in_rows(plan, sizes, lambda rows, own: ring.keys_alive(rows, rows.rotation, own))


def _refuses(case: AttentionCase) -> str | None:
    if case.inner is None or case.heads % case.inner == 0:
        return None
    nearest = max(n for n in divisors(math.gcd(case.heads, case.world)) if n <= case.inner)
    return (
        f"attention.inner={case.inner} must divide the {case.heads} query heads of a rank; nearest valid: "
        f"attention.inner={nearest}"
    )


def _row(case: AttentionCase) -> int:
    """As many ranks as share the heads evenly: an all-to-all moves less than a ring."""
    return math.gcd(case.heads, case.world)


STRATEGIES = {
    "usp": Strategy(
        "usp",
        swapped("usp", ring.forward, ring.backward),
        "zigzag",
        _refuses,
        summed(sends),
        peak,
        frozenset({"inner", "travel"}),
        _row,
        work=work_in_rows,
        sends=sends,
    )
}
