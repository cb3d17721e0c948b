"""Ulysses: every rank computes attention of the whole sequence for its share of the heads.

Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
Models" (2023).

    all-to-all: q, k, v of my tokens and all heads  ->  of all tokens and my heads
    attention of the whole sequence, on one device
    all-to-all: out of all tokens and my heads      ->  of my tokens and all heads

Ranks share key/value heads where there are fewer of those than ranks; the adjoint sums what they return. The whole
group is one row of a grid (``runtime.all_to_all``), which brings heads group by group, so that swaps hide.
"""

from __future__ import annotations

import math

from longctx.attention.runtime.all_to_all import swapped
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
    swapped("ulysses", local.forward, local.backward),
    layout="contiguous",
    refuses=_refuses,
    grid=Grid(lambda case: case.world),
    work=work_in_rows,
    costs="longctx.attention.costs.ulysses:COSTS",
)
