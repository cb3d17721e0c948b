"""USP: Ulysses inside the rows of a grid of ranks, a ring across its columns.

Fang, Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI" (2024).

    q, k, v = all_to_all(q, k, v) in my row    from my tokens, all heads to the row's tokens, my heads
    out = ring_attention(q, k, v) in my column, of which each row is one rank
    out = all_to_all(out) in my row            from the row's tokens, my heads to my tokens, all heads

A row holds the tokens of its ranks in order of position, under any layout. Which of them the ring reads of another row
follows from that (``SequencePlan.joined``).
"""

from __future__ import annotations

import math

from longctx.attention.runtime.all_to_all import define_ulysses
from longctx.attention.runtime.head_sharding import work_in_rows
from longctx.attention.runtime.registry import AttentionCase, Grid, Strategy
from longctx.attention.strategies import ring
from longctx.rules import divisors


def _refuses(case: AttentionCase) -> str | None:
    degree = case.options.ulysses_degree
    if degree is None or case.heads % degree == 0:
        return None
    nearest = max(n for n in divisors(math.gcd(case.heads, case.world)) if n <= degree)
    return (
        f"attention.ulysses_degree={degree} must divide the {case.heads} query heads of a rank; nearest valid: "
        f"attention.ulysses_degree={nearest}"
    )


def _row(case: AttentionCase) -> int:
    """As many ranks as share the heads evenly: an all-to-all moves less than a ring."""
    return math.gcd(case.heads, case.world)


USP = Strategy(
    "usp",
    define_ulysses("usp", ring.forward, ring.backward),
    refuses=_refuses,
    options=frozenset({"ulysses_degree", "grad_dtype"}),
    grid=Grid(_row, option="ulysses_degree"),
    work=work_in_rows,
    costs="longctx.attention.costs.usp:COSTS",
)
