"""Blocks of rows that travel from rank to rank, and what comes home of them.

Shared by the strategies whose blocks go round a ring; ``sequence.ring_schedule`` says who holds which rows when.
In each hop every rank posts, in this order: the copy that crosses to the next row of ranks (at a lap's start), the
block that moves on, and after computing the gradients that ride behind and those that go home.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.comm import Group, Pending, exchange
from longctx.sequence import RingSchedule, Rows

ROWS = 2  # the dim of tokens in every tensor of a block, [n, B, rows, H/TP, ...]
Block = tuple[Tensor, ...]


def travel(block: Block, rotation: RingSchedule, group: Group) -> Iterator[tuple[int, Rows, Block]]:
    """Yields (hop, the owner's rows in the block, block) while the next blocks are in flight.

    ``block``: all valid rows of this rank. A crossing copy is posted at a lap's start and awaited at its end: a
    whole lap of computing hides it.
    """
    rows = rotation.carried(group.rank, 0)
    crossing: Pending | None = None
    for hop in range(rotation.world):
        moving = None
        if hop % rotation.lap == 0:
            crossing = _pass_on(block, rows, hop, hop + rotation.lap, rotation, group)
        if (hop + 1) % rotation.lap:
            moving = _pass_on(block, rows, hop, hop + 1, rotation, group)
        yield hop, rows, block
        arriving = moving or crossing
        assert arriving is not None, "a lap starts with a crossing"
        block = tuple(arriving.wait())
        crossing = crossing if moving else None
        del moving, arriving  # or what they sent would be here for another hop
        rows = rotation.carried(rotation.owner(group.rank, hop + 1), hop + 1)


def _pass_on(block: Block, rows: Rows, hop: int, to: int, rotation: RingSchedule, group: Group) -> Pending:
    """Sends what is read from hop ``to`` on to the block's holder there; expects the block that is here then."""
    me, lap = group.rank, rotation.lap
    owner, following = rotation.owner(me, hop), rotation.owner(me, to)
    receiver, sender = rotation.holder(owner, to), rotation.holder(following, hop)
    if to % lap:
        channel, receiver, sender = group.inner or group, receiver % lap, sender % lap
    else:
        channel, receiver, sender = group.outer or group, receiver // lap, sender // lap
    leaving, coming = rotation.carried(owner, to), rotation.carried(following, to)
    return exchange(
        channel,
        sends=[(receiver, select_rows(part, rows, leaving)) for part in block],
        receives=[(sender, receive_buffer(part, coming)) for part in block],
    )


def send_home(block: Block, hop: int, leaving: Rows, coming: Rows, rotation: RingSchedule, group: Group) -> Pending:
    """Sends rows ``leaving`` to the owner of the block at hand; expects rows ``coming`` from this rank's holder."""
    owner, holder = rotation.owner(group.rank, hop), rotation.holder(group.rank, hop)
    return exchange(
        group.back or group,
        sends=[(owner, part) for part in block],
        receives=[(holder, receive_buffer(part, coming)) for part in block],
    )


class GradientReturn:
    """Gradients of visiting blocks on their way to the blocks' owners.

    ``home``: this rank's own, ``[B, T/SP, H/TP, D]`` each, which it adds to. Summed on their way: they ride one step
    behind their block and go home from a row's last reader in a lap, in the accumulation dtype. Returned
    directly, where ``dtype`` is given: each holder's share goes home by itself in that dtype.
    """

    def __init__(self, home: Block, rotation: RingSchedule, group: Group, dtype: torch.dtype | None) -> None:
        self._home = home
        self._rotation = rotation
        self._group = group
        self._dtype = dtype
        self._riding: Pending | None = None
        self._shares = home[0].new_empty(0)
        self._arriving: deque[tuple[Rows, Pending]] = deque()
        # Summed on a double ring, a row comes home once a lap and has the next one for it. Of direct returns, and to
        # where a causal ring ends, a block's worth may come each hop, and each is memory while it is under way.
        self._most = rotation.lap if dtype is None and rotation.lap < rotation.world else 1

    def buffer(self, hop: int, rows: Rows) -> Block:
        """Where the rank adds its share of the gradients of the block at hand, ``[B, rows, H/TP, D]`` each: its own
        block's are at home, of a visiting one they are zero so far."""
        if hop == 0:
            return tuple(whole.narrow(1, 0, len(rows)) for whole in self._home)
        whole = self._home[0]
        self._shares = whole.new_zeros(len(self._home), whole.shape[0], len(rows), *whole.shape[2:])
        return tuple(self._shares)

    def send(self, hop: int) -> None:
        """What lies in the ``buffer`` of this hop is the rank's whole share; sends it on its way."""
        if hop == 0:
            return
        shares, owner = self._shares, self._rotation.owner(self._group.rank, hop)
        stop = self._rotation.at(owner, hop)
        if self._dtype is None:
            self._ride(hop, owner, select_rows(shares, stop.carried, stop.summed))
        else:
            leaving = select_rows(shares, stop.carried, stop.read).to(self._dtype)
            self._send_home(hop, leaving, stop.read, self._rotation.at(self._group.rank, hop).read)

    def finish(self) -> Block:
        """This rank's gradients, complete."""
        while self._arriving:
            self._take_in()
        return self._home

    def _ride(self, hop: int, owner: int, shares: Tensor) -> None:
        rotation, group = self._rotation, self._group
        if self._riding:
            shares += self._riding.wait()[0]
            self._riding = None
        held = rotation.at(owner, hop).summed
        if (hop + 1) % rotation.lap:
            following = rotation.owner(group.rank, hop + 1)
            leaving = select_rows(shares, held, rotation.riding(owner, hop + 1))
            coming = receive_buffer(shares, rotation.riding(following, hop + 1))
            self._riding = exchange(
                group,
                sends=[(rotation.holder(owner, hop + 1), leaving)],
                receives=[(rotation.holder(following, hop), coming)],
            )
        ended = rotation.ended(owner, hop)
        self._send_home(hop, select_rows(shares, held, ended), ended, rotation.ended(group.rank, hop))

    def _send_home(self, hop: int, shares: Tensor, leaving: Rows, coming: Rows) -> None:
        pending = send_home((shares,), hop, leaving, coming, self._rotation, self._group)
        self._arriving.append((coming, pending))
        while len(self._arriving) > self._most:
            self._take_in()

    def _take_in(self) -> None:
        rows, pending = self._arriving.popleft()
        self._add(rows, pending.wait()[0])

    def _add(self, rows: Rows, shares: Tensor) -> None:
        for whole, share in zip(self._home, shares, strict=True):
            rows.add_to(whole, share)


def select_rows(part: Tensor, rows: Rows, kept: Rows) -> Tensor:
    """``kept`` of the ``rows`` that a part of a block holds; the part itself if that is all of them."""
    return part if kept == rows else kept.inside(rows).take(part, ROWS).contiguous()


def receive_buffer(part: Tensor, rows: Rows) -> Tensor:
    """A buffer for these rows of a part of another block."""
    return part.new_empty(*part.shape[:ROWS], len(rows), *part.shape[ROWS + 1 :])


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(like.shape, dtype=dtype)


def tally(messages: list[tuple[int, Rows]]) -> tuple[int, int]:
    """Rows that these messages carry together, and how many messages they are."""
    return sum(len(rows) for _, rows in messages), len(messages)
