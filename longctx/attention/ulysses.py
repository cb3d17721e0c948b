"""Ulysses: every rank computes attention of the whole sequence for its share of the heads.

Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
Models" (2023).

    all-to-all: q, k, v of my tokens and all heads  ->  of all tokens and my heads
    attention of the whole sequence, on one device
    all-to-all: out of all tokens and my heads      ->  of my tokens and all heads

Ranks share key/value heads where there are fewer of those than ranks; the adjoint sums what they return. The whole
group is one row of a grid (``longctx.attention.in_rows``), which brings heads group by group, so that swaps hide.
"""

from __future__ import annotations

from longctx.attention import local
from longctx.attention.in_rows import swapped
from longctx.attention.registry import AttentionCase, Peak, Sizes, Strategy, divisors, summed
from longctx.attention.swap import HeadGroups, swap_sends, work_in_rows
from longctx.sequence import SequencePlan


def _refuses(case: AttentionCase) -> str | None:
    if case.heads % case.world == 0:
        return None
    nearest = max(n for n in divisors(case.heads) if n <= case.world)
    return (
        f"{case.world} ranks of a sequence must divide the {case.heads} query heads of a rank; nearest valid: "
        f"parallel.sp={nearest}, or attention=usp with attention.inner={nearest}, or attention=gather"
    )


def peak(plan: SequencePlan, sizes: Sizes) -> Peak:
    """What is kept of each group of heads, the parts of q, k, v as they arrive and go, and out or the gradients coming
    home; of two groups, the one that computes beside the buffers of the other."""
    rows, held = plan.shard, sizes.held
    away = 1 - 1 / plan.world  # of a rank's tokens in the heads of others, and of its heads the tokens
    if HeadGroups.of(sizes.heads, sizes.kv_heads, plan.world).count == 1:
        entering = held(queries=1 + 2 * away, keys=1 + 2 * away)
        leaving = held(queries=3 + 2 * away, keys=1, sums=1)
        return Peak(rows * max(entering, leaving), rows * held(queries=5 + 2 * away, keys=3 + 2 * away, sums=1))
    entering = held(queries=5 / 2 + 2 * away, keys=1 + away, sums=1 / 2)
    leaving = held(queries=3 + away, outputs=1 / 2, keys=1, sums=1)
    both = held(queries=9 / 2 + away, outputs=1 / 2, keys=5 / 2 + away, gradients=1 / 2, sums=1)
    return Peak(rows * max(entering, leaving), rows * both)


STRATEGIES = {
    "ulysses": Strategy(
        "ulysses",
        swapped("ulysses", local.forward, local.backward),
        "contiguous",
        _refuses,
        summed(swap_sends),
        peak,
        inner=lambda case: case.world,
        work=work_in_rows,
        sends=swap_sends,
    )
}
