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

from longctx.attention import ring
from longctx.attention.in_rows import swapped
from longctx.attention.registry import AttentionCase, Peak, Sent, Sizes, Strategy, divisors, summed
from longctx.attention.swap import HeadGroups, swap_sends, work_in_rows
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
    """q, k and v of the row's tokens, and the ring over them, or over one of two groups of their heads beside what
    comes home of the other; backward also out, and dout."""
    rows, held = plan.shard, sizes.held
    if HeadGroups.of(sizes.heads, sizes.kv_heads, sizes.inner).count == 1:
        return Peak(
            rows * held(queries=1, outputs=1, sums=1, keys=1 + 2),
            rows * held(queries=4, outputs=1, sums=1, keys=1 + 2, gradients=1 + 3),
        )
    away = 1 - 1 / sizes.inner
    return Peak(
        rows * held(queries=5 / 2 + away, outputs=1 / 2, sums=1, keys=1 + 1),
        rows * held(queries=9 / 2 + away, outputs=1 / 2, sums=1, keys=3 + away, gradients=1 / 2 * (1 + 3)),
    )


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
