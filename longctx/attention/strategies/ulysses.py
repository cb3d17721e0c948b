"""Ulysses: every rank computes attention of the whole sequence for its share of the heads.

Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
Models" (2023).

    q, k, v = all_to_all(q, k, v)    from my tokens, all heads to all tokens, my heads
    out = attention(q, k, v)         of the whole sequence, on one device
    out = all_to_all(out)            from all tokens, my heads to my tokens, all heads

Where key/value heads are fewer than ranks, ranks share them, and the backward pass sums their gradients. The whole
group is one row of a grid (``runtime.all_to_all``). Heads go in groups, so that the all-to-alls of one group hide
behind the computing of another.
"""

from __future__ import annotations

import math

from longctx.attention.runtime.all_to_all import define_ulysses
from longctx.attention.runtime.head_sharding import work_in_rows
from longctx.attention.runtime.registry import AttentionCase, Grid, Strategy
from longctx.attention.strategies import local
from longctx.rules import divisors


def _refuses(case: AttentionCase) -> str | None:
    if case.heads % case.world == 0:
        return None
    nearest = max(n for n in divisors(case.heads) if n <= case.world)
    inner = math.gcd(case.heads, case.world)
    return (
        f"{case.world} ranks of a sequence must divide the {case.heads} query heads of a rank; nearest valid: "
        f"parallel.sp={nearest}, or attention=usp with attention.ulysses_degree={inner}, or attention=gather"
    )


ULYSSES = Strategy(
    "ulysses",
    define_ulysses("ulysses", local.forward, local.backward),
    layout="contiguous",
    refuses=_refuses,
    grid=Grid(lambda case: case.world),
    work=work_in_rows,
    costs="longctx.attention.costs.ulysses:COSTS",
)
