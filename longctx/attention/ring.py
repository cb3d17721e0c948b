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

from longctx.attention.operator import Call, Saved, define_operator
from longctx.attention.partial import Partial, accumulation_dtype
from longctx.attention.registry import AttentionCase, Sizes, Strategy, Volume
from longctx.comm import Group, Pending, exchange
from longctx.sequence import Rows, SequencePlan, TileSet

ROWS = 2  # the dim of tokens in a block of keys and values (or their gradients), [2, B, rows, Hkv/TP, D]


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q ``[B, T/SP, H/TP, D]``, k and v ``[B, T/SP, Hkv/TP, D]`` to (out, lse) of the local queries."""
    partial = Partial(q)
    for _, _, (keys, values), tiles in circulate(k, v, call.plan, call.group):
        call.kernel.forward(q, keys, values, tiles, call.scale, partial)
    return partial.out, partial.lse


def backward(dout: Tensor, saved: Saved, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v. Given the global lse, each block's share is independent of the others."""
    q, k, v, out, lse = saved
    plan, group, dtype = call.plan, call.group, accumulation_dtype(q.dtype)
    dq, home = _zeros(q, dtype), (_zeros(k, dtype), _zeros(v, dtype))
    before: Pending | None = None  # shares of the block at hand, summed over the ranks that it has visited
    returning: list[tuple[Rows, Pending]] = []
    for hop, rows, block, tiles in circulate(k, v, plan, group):
        shares = _zeros(block, dtype)
        call.kernel.backward(dout, q, block[0], block[1], out, lse, tiles, call.scale, (dq, shares[0], shares[1]))
        if before:
            shares += before.wait()[0]
        if hop == 0:
            add_home(home, rows, shares)
        elif call.options.travel == "narrow":
            returning.append(return_share(shares.to(k.dtype), hop, plan, group))
        else:
            before = pass_on(shares, rows, hop, plan, group)
            returning.append(send_home(shares, rows, hop, plan, group))
    for rows, pending in returning:
        add_home(home, rows, pending.wait()[0])
    return dq, *home


def add_home(home: tuple[Tensor, Tensor], rows: Rows, shares: Tensor) -> None:
    """Adds gradients ``[2, B, rows, Hkv/TP, D]`` to these rows of the rank's own (dk, dv)."""
    for whole, share in zip(home, shares, strict=True):
        rows.add_to(whole, share)


def circulate(
    k: Tensor, v: Tensor, plan: SequencePlan, group: Group
) -> Iterator[tuple[int, Rows, Tensor, tuple[TileSet, ...]]]:
    """Yields (hop, the owner's rows in the block, block, tiles owed to it) while the next block is in flight."""
    rotation, me = plan.rotation, group.rank
    rows = rotation.carried(me, 0)
    block = torch.stack((rows.take(k), rows.take(v)))
    for hop in range(group.size):
        passing = pass_on(block, rows, hop, plan, group)
        yield hop, rows, block, plan.packed_tiles(me, rotation.owner(me, hop), rows)
        rows = rotation.carried(rotation.owner(me, hop + 1), hop + 1)
        [block] = passing.wait()


def pass_on(block: Tensor, rows: Rows, hop: int, plan: SequencePlan, group: Group) -> Pending:
    """Sends what later ranks read of the block at hand to the next rank; expects the block of the next hop."""
    rotation, me = plan.rotation, group.rank
    owner, following = rotation.owner(me, hop), rotation.owner(me, hop + 1)
    leaving, coming = rotation.carried(owner, hop + 1), rotation.carried(following, hop + 1)
    return exchange(
        group,
        sends=[(rotation.holder(owner, hop + 1), _narrowed(block, rows, leaving))],
        receives=[(rotation.holder(following, hop), _buffer(block, coming))],
    )


def send_home(shares: Tensor, rows: Rows, hop: int, plan: SequencePlan, group: Group) -> tuple[Rows, Pending]:
    """Sends gradients of the block at hand that are complete at this hop to the block's owner.

    Returns the rows of the rank's own block that come home from its holder at this hop, and their arrival.
    """
    rotation, me = plan.rotation, group.rank
    owner, own = rotation.owner(me, hop), rotation.ended(me, hop)
    complete = _narrowed(shares, rows, rotation.ended(owner, hop))
    arrival = exchange(group, [(owner, complete)], [(rotation.holder(me, hop), _buffer(shares, own))])
    return own, arrival


def return_share(shares: Tensor, hop: int, plan: SequencePlan, group: Group) -> tuple[Rows, Pending]:
    """Sends this rank's own share of the gradients of the block at hand to the block's owner, unsummed.

    Returns the rows of the rank's own block that its holder at this hop has a share of, and their arrival.
    """
    rotation, me = plan.rotation, group.rank
    own = rotation.carried(me, hop)
    arrival = exchange(group, [(rotation.owner(me, hop), shares)], [(rotation.holder(me, hop), _buffer(shares, own))])
    return own, arrival


def _narrowed(block: Tensor, rows: Rows, kept: Rows) -> Tensor:
    """``kept`` of the ``rows`` that a block holds; the block itself if that is all of them."""
    return block if kept == rows else kept.inside(rows).take(block, ROWS).contiguous()


def _buffer(block: Tensor, rows: Rows) -> Tensor:
    return block.new_empty(2, block.shape[1], len(rows), *block.shape[3:])


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(like.shape, dtype=dtype)


def volume(plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """What a rank sends: keys and values of the rows it passes on, in the backward pass once more, and dk and dv
    of every row it has held for others, passed on, sent home, or both.
    """
    rotation, world = plan.rotation, plan.world
    hops = [(rotation.owner(rank, hop), hop) for hop in range(world)]
    blocks = sum(bool(rotation.carried(owner, hop + 1)) for owner, hop in hops)
    passed = 2 * rotation.rows_sent(rank) * sizes.keys
    gradients = 2 * rotation.gradient_rows_sent(rank)
    if sizes.options.travel == "narrow":
        shares = sum(bool(rotation.carried(owner, hop)) for owner, hop in hops[1:])
        return Volume(passed, passed + gradients * sizes.keys, blocks, blocks + shares)
    shares = sum(bool(rotation.carried(owner, hop + 1)) + bool(rotation.ended(owner, hop)) for owner, hop in hops[1:])
    return Volume(passed, passed + gradients * sizes.key_gradients, blocks, blocks + shares)


def _refuses_striped(case: AttentionCase) -> str | None:
    if case.layout != "striped":
        return f"layout {case.layout!r}: it is the ring over the striped layout; use attention.layout=striped, or ring"
    return None


attend = define_operator("ring", forward, backward)

_TAKES = frozenset({"travel"})

STRATEGIES = {
    "ring": Strategy("ring", attend, "zigzag", lambda case: None, volume, _TAKES),
    "striped": Strategy("striped", attend, "striped", _refuses_striped, volume, _TAKES),
}
