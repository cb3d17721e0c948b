"""Ring attention: key/value blocks go round, queries stay.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023);
Brandon et al., "Striped Attention: Faster Ring Attention for Causal Transformers" (2023). The zigzag form
is that of Llama 3 and zhuzilin/ring-flash-attention. They differ in the layout alone, hence in the plan's
tiles and rotation; this loop is the same for all of them, and for one rank.

    for hop = 0 .. P-1:                        for hop = 0 .. P-1:
        pass my block on, expect the next          pass my block on, expect the next
        merge attention of q over my block         dq += ..., dk, dv of my block += ...
        take the block that arrived                send dk, dv after their block, or home

A block is narrowed to the rows that some later rank reads and stops after its last reader; its gradients,
in the accumulation dtype, go home from there (``longctx.sequence.rotation``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.attention.contract import LocalKernel
from longctx.attention.operator import define_operator
from longctx.attention.partial import Partial, accumulation_dtype
from longctx.attention.registry import AttentionCase, Strategy, Volume
from longctx.comm import Group, Pending, exchange
from longctx.sequence import Rows, SequencePlan, TileSet

Block = tuple[Tensor, Tensor]  # keys and values (or their gradients), each [B, rows, Hkv/TP, D]


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, group: Group, kernel: LocalKernel, scale: float
) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    partial = Partial(q)
    for _, _, block, tiles in circulate(k, v, plan, group):
        kernel.forward(q, *block, tiles, scale, partial)
    return partial.out, partial.lse


def backward(
    dout: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    plan: SequencePlan,
    group: Group,
    kernel: LocalKernel,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v. Given the global lse, each block's share is independent of the others."""
    q, k, v, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    dq = _zeros(q, dtype)
    home = (_zeros(k, dtype), _zeros(v, dtype))
    before: Pending | None = None  # shares of the block at hand, summed over the ranks that it has visited
    returning: list[tuple[Rows, Pending]] = []
    for hop, rows, block, tiles in circulate(k, v, plan, group):
        shares = home if hop == 0 else (_zeros(block[0], dtype), _zeros(block[1], dtype))
        kernel.backward(dout, q, *block, out, lse, tiles, scale, (dq, *shares))
        if hop == 0:
            continue
        if before:
            for share, sum_before in zip(shares, before.wait()[0], strict=True):
                share += sum_before
        before = pass_on(shares, rows, hop, plan, group)
        returning.append(send_home(shares, rows, hop, plan, group))
    for rows, pending in returning:
        for whole, complete in zip(home, pending.wait()[0], strict=True):
            rows.add_to(whole, complete)
    return dq, *home


def circulate(
    k: Tensor, v: Tensor, plan: SequencePlan, group: Group
) -> Iterator[tuple[int, Rows, Block, tuple[TileSet, ...]]]:
    """Yields (hop, the owner's rows in the block, block, tiles owed to it) while the next block is in flight."""
    rows, block = Rows(((0, plan.shard),)), (k, v)
    for hop in range(group.size):
        owner = plan.rotation.owner(group.rank, hop)
        passing = pass_on(block, rows, hop, plan, group)
        yield hop, rows, block, plan.packed_tiles(group.rank, owner, rows)
        rows = plan.rotation.carried(plan.rotation.owner(group.rank, hop + 1), hop + 1)
        keys, values = passing.wait()[0]
        block = (keys, values)


def pass_on(block: Block, rows: Rows, hop: int, plan: SequencePlan, group: Group) -> Pending:
    """Sends what later ranks read of the block at hand to the next rank; expects the block of the next hop."""
    rotation, me = plan.rotation, group.rank
    owner, following = rotation.owner(me, hop), rotation.owner(me, hop + 1)
    leaving = rotation.carried(owner, hop + 1).inside(rows)
    coming = rotation.carried(following, hop + 1)
    return exchange(
        group,
        sends=[(rotation.holder(owner, hop + 1), _packed(block, leaving))],
        receives=[(rotation.holder(following, hop), _buffer(block[0], coming))],
    )


def send_home(shares: Block, rows: Rows, hop: int, plan: SequencePlan, group: Group) -> tuple[Rows, Pending]:
    """Sends gradients of the block at hand that are complete at this hop to the block's owner.

    Returns the rows of the rank's own block that come home from its holder at this hop, and their arrival.
    """
    rotation, me = plan.rotation, group.rank
    owner, own = rotation.owner(me, hop), rotation.ended(me, hop)
    complete = _packed(shares, rotation.ended(owner, hop).inside(rows))
    arrival = exchange(group, [(owner, complete)], [(rotation.holder(me, hop), _buffer(shares[0], own))])
    return own, arrival


def _packed(block: Block, rows: Rows) -> Tensor:
    """One message ``[2, B, rows, Hkv/TP, D]``."""
    return torch.stack([rows.take(part) for part in block])


def _buffer(like: Tensor, rows: Rows) -> Tensor:
    return like.new_empty(2, like.shape[0], len(rows), *like.shape[2:])


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(like.shape, dtype=dtype)


def volume(plan: SequencePlan, rank: int, row_bytes: int, gradient_row_bytes: int) -> Volume:
    """Bytes that a rank sends: keys and values of the rows it passes on, in the backward pass once more,
    and dk and dv of every row it has held for others.
    """
    passed = 2 * plan.rotation.rows_sent(rank) * row_bytes
    gradients = 2 * plan.rotation.gradient_rows_sent(rank) * gradient_row_bytes
    return Volume(passed, passed + gradients)


def _refuses_striped(case: AttentionCase) -> str | None:
    if case.layout != "striped":
        return f"layout {case.layout!r}: it is the ring over the striped layout; use attention.layout=striped, or ring"
    return None


_operator = define_operator("ring", forward, backward)

STRATEGIES = {
    "ring": Strategy("ring", _operator, "zigzag", lambda case: None, volume),
    "striped": Strategy("striped", _operator, "striped", _refuses_striped, volume),
}
