"""Bytes and memory of the all-to-alls of Ulysses and USP (``runtime.all_to_all``).

Memory counts each group of heads, and the groups before and after it that are in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from longctx.attention.costs.estimate import Peak, Sent, Volume
from longctx.attention.runtime.head_sharding import HeadGroups, HeadSplit
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan, row_places

Attention = Callable[[SequencePlan, Sizes], Peak]  # of the passes between rows, beside what is saved


def all_to_all_sends(plan: SequencePlan, rank: int, sizes: Sizes) -> list[Sent]:
    """Returns what a rank sends inside its row of the grid, by receiver.

    Forward, its tokens' q, k, v go to the ranks that compute their heads, and other ranks' outputs return. Backward,
    dout goes to heads, and dq, dk, dv of other ranks' tokens return.
    """
    inner = sizes.inner
    first, me = rank // inner * inner, rank % inner
    groups = HeadGroups.of(sizes.heads, sizes.kv_heads, inner)
    split, messages = HeadSplit(sizes.heads, sizes.kv_heads, inner), groups.count
    head = sizes.batch * sizes.head_dim * sizes.element
    queries, mine, own = split.queries, split.queries + 2 * split.keys(me), len(plan.positions(rank))
    sent = []
    for other in range(inner):
        theirs, together = len(plan.positions(first + other)), split.queries + 2 * split.keys(other)
        if other != me and own:
            sent.append((first + other, Volume(head * own * together, head * own * queries, messages, messages)))
        if other != me and theirs:
            sent.append((first + other, Volume(head * theirs * queries, head * theirs * mine, messages, messages)))
    return sent


def peak_in_rows(plan: SequencePlan, sizes: Sizes, attention: Attention) -> Peak:
    """Returns the peak memory of the rank with most, in bytes.

    ``attention``: the peak of attention between the all-to-alls, by a joined plan and one group's heads.
    """
    groups = HeadGroups.of(sizes.heads, sizes.kv_heads, sizes.inner)
    alive = [
        [_Group.of(plan, sizes, groups.part(rank, group), groups, attention) for group in range(groups.count)]
        for rank in range(sizes.inner)
    ]
    return Peak(
        max(_forward(plan, sizes, made) for made in alive),
        max(_backward(plan, sizes, groups.shared, made) for made in alive),
    )


@dataclass(frozen=True)
class _Group:
    """Bytes of one group's tensors on one rank; q, k and v together.

    ``swapped``: parts that leave and arrive of q, k and v, or of their gradients; ``out_swapped``: of out, or of dout.
    ``landed``: of the row's tokens, in order; ``copied``: keys and values once more, for each query head; ``inputs``:
    what attention takes of both. ``wide``: gradients as they are summed. ``picked``: of out, by index; ``own``: its
    gradients of this rank's own tokens, where they are added. ``inside``: what attention makes.
    """

    swapped: int
    out_swapped: int
    landed: int
    copied: int
    inputs: int
    out: int
    out_wide: int
    lse: int
    wide: int
    picked: int
    own: int
    inside: Peak

    @classmethod
    def of(cls, plan: SequencePlan, sizes: Sizes, part: int, groups: HeadGroups, attention: Attention) -> _Group:
        split, one, joined = groups.split, replace(sizes, heads=1, kv_heads=1), plan.joined(groups.ranks)
        me, group = divmod(part, groups.count)
        mine, local = split.queries + 2 * split.keys(part), split.local_keys(part)
        others = [groups.part(rank, group) for rank in range(groups.ranks) if rank != me]
        away = sum(split.queries + 2 * split.keys(other) + mine for other in others)
        copied = 2 * local if split.copies(part) else 0
        by_index = not all(row_places(plan, groups.ranks, row).in_runs for row in range(joined.world))
        summed = 2 * split.keys(part) if copied else 0
        return cls(
            swapped=plan.shard * away * one.queries,
            out_swapped=plan.shard * 2 * len(others) * split.queries * one.queries,
            landed=joined.shard * mine * one.queries,
            copied=joined.shard * copied * one.queries,
            inputs=joined.shard * (split.queries + 2 * local) * one.queries,
            out=joined.shard * split.queries * one.queries,
            out_wide=joined.shard * split.queries * one.query_gradients,
            lse=joined.shard * split.queries * one.lse,
            wide=joined.shard * (split.queries + 2 * local + summed) * one.query_gradients,
            picked=plan.shard * split.queries * by_index * one.queries,
            own=plan.shard * mine * one.queries if groups.shared else 0,
            inside=attention(joined, replace(sizes, heads=split.queries, kv_heads=local, inner=1)),
        )


def _forward(plan: SequencePlan, sizes: Sizes, alive: list[_Group]) -> int:
    most = kept = returning = 0
    for made, coming in zip(alive, [*(following.swapped for following in alive[1:]), 0], strict=True):
        others = kept + returning + coming
        kept += made.inputs + made.out + made.lse
        returning = plan.shard * sizes.queries + made.out_swapped
        moments = (
            others + made.swapped + made.landed + made.copied,
            others + made.inputs + made.inside.forward,
            others + made.inputs + made.out_wide + made.out + made.lse,
            kept + returning + coming + made.picked,
        )
        most = max(most, *moments)
    return most


def _backward(plan: SequencePlan, sizes: Sizes, shared: bool, alive: list[_Group]) -> int:
    keys = sizes.key_gradients if shared else sizes.keys
    saved = sum(made.inputs + made.out + made.lse for made in alive) + plan.shard * sizes.queries
    wholes = plan.shard * (sizes.queries + 2 * keys)
    most, returning = saved + wholes + (2 * plan.shard * sizes.keys if shared else 0), 0
    for made, coming in zip(alive, [*(following.out_swapped for following in alive[1:]), 0], strict=True):
        others = saved + returning + coming
        returning = wholes + made.swapped
        moments = (
            others + made.out_swapped + made.out,
            others + made.out + made.inside.backward,
            others + made.wide + made.landed,
            saved + returning + coming + made.landed + made.picked + made.own,
        )
        most = max(most, *moments)
    return most
