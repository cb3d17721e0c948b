"""Transport around a ring: blocks rotate from rank to rank, and their gradients or results return to their owners.

``sequence.ring_schedule`` says who holds which rows when. In each hop every rank posts the copy that crosses to the
next row of ranks (at a lap's start), then the block that moves on. After computing come the gradients that follow
behind, and those that return.
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


def rotate_blocks(block: Block, schedule: RingSchedule, group: Group) -> Iterator[tuple[int, Rows, Block]]:
    """Yields (hop, the owner's rows in the block, block) while the next blocks are in flight.

    ``block``: all valid rows of this rank. A crossing copy is posted at a lap's start and awaited at its end: a whole
    lap of computing hides it.
    """
    rows = schedule.carried(group.rank, 0)
    crossing: Pending | None = None
    for hop in range(schedule.world):
        passing = None
        if hop % schedule.lap == 0:
            crossing = _send_recv(block, rows, hop, hop + schedule.lap, schedule, group)
        if (hop + 1) % schedule.lap:
            passing = _send_recv(block, rows, hop, hop + 1, schedule, group)
        yield hop, rows, block
        coming = passing or crossing
        assert coming is not None, "a lap starts with a crossing"
        block = tuple(coming.wait())
        crossing = crossing if passing else None
        del passing, coming  # or what they sent would be here for another hop
        rows = schedule.carried(schedule.owner(group.rank, hop + 1), hop + 1)


def _send_recv(block: Block, rows: Rows, hop: int, to: int, schedule: RingSchedule, group: Group) -> Pending:
    """Sends the rows that are read from hop ``to`` on to the block's next holder, and receives the next block."""
    me, lap = group.rank, schedule.lap
    owner, following = schedule.owner(me, hop), schedule.owner(me, to)
    receiver, sender = schedule.holder(owner, to), schedule.holder(following, hop)
    if to % lap:
        channel, receiver, sender = group.inner or group, receiver % lap, sender % lap
    else:
        channel, receiver, sender = group.outer or group, receiver // lap, sender // lap
    leaving, coming = schedule.carried(owner, to), schedule.carried(following, to)
    return exchange(
        channel,
        sends=[(receiver, select_rows(part, rows, leaving)) for part in block],
        receives=[(sender, receive_buffer(part, coming)) for part in block],
    )


def return_to_owner(
    block: Block, hop: int, leaving: Rows, coming: Rows, schedule: RingSchedule, group: Group
) -> Pending:
    """Sends results for the block at hand to its owner, and expects those for this rank's own block.

    ``leaving``: rows of the block at hand. ``coming``: rows of this rank's block, from the rank that holds it.
    """
    owner, holder = schedule.owner(group.rank, hop), schedule.holder(group.rank, hop)
    return exchange(
        group.back or group,
        sends=[(owner, part) for part in block],
        receives=[(holder, receive_buffer(part, coming)) for part in block],
    )


class GradientReturn:
    """Returns gradients of visiting blocks to the blocks' owners, summed on their way or directly.

    ``grads``: this rank's own, ``[B, T/SP, H/TP, D]`` each, which it adds to. Summed on their way, gradients follow one
    hop behind their block and return from a row's last reader in a lap, in the accumulation dtype. Where ``dtype`` is
    given, each holder's share returns directly, in that dtype.
    """

    def __init__(self, grads: Block, schedule: RingSchedule, group: Group, dtype: torch.dtype | None) -> None:
        self._grads = grads
        self._schedule = schedule
        self._group = group
        self._dtype = dtype
        self._partial_sums: Pending | None = None
        self._shares = grads[0].new_empty(0)
        self._in_flight: deque[tuple[Rows, Pending]] = deque()
        # Summed on a double ring, a row returns once a lap and has the next lap for it. Of direct returns, and where
        # a causal ring ends, a block's worth may come each hop. Each takes memory while it is in flight.
        self._max_in_flight = schedule.lap if dtype is None and schedule.lap < schedule.world else 1

    def buffer(self, hop: int, rows: Rows) -> Block:
        """Returns where the rank adds its share of the gradients of the block at hand, ``[B, rows, H/TP, D]`` each.

        Those of its own block are ``grads``; those of a visiting block are zero so far.
        """
        if hop == 0:
            return tuple(whole.narrow(1, 0, len(rows)) for whole in self._grads)
        whole = self._grads[0]
        self._shares = whole.new_zeros(len(self._grads), whole.shape[0], len(rows), *whole.shape[2:])
        return tuple(self._shares)

    def send(self, hop: int) -> None:
        """Sends the rank's whole share of this hop, which lies in ``buffer``."""
        if hop == 0:
            return
        shares, owner = self._shares, self._schedule.owner(self._group.rank, hop)
        stop = self._schedule.at(owner, hop)
        if self._dtype is None:
            self._send_sums(hop, owner, select_rows(shares, stop.carried, stop.summed))
        else:
            leaving = select_rows(shares, stop.carried, stop.read).to(self._dtype)
            self._return(hop, leaving, stop.read, self._schedule.at(self._group.rank, hop).read)

    def finish(self) -> Block:
        """Returns this rank's gradients, complete."""
        while self._in_flight:
            self._receive()
        return self._grads

    def _send_sums(self, hop: int, owner: int, shares: Tensor) -> None:
        schedule, group = self._schedule, self._group
        if self._partial_sums:
            shares += self._partial_sums.wait()[0]
            self._partial_sums = None
        held = schedule.at(owner, hop).summed
        if (hop + 1) % schedule.lap:
            following = schedule.owner(group.rank, hop + 1)
            leaving = select_rows(shares, held, schedule.passed_on(owner, hop + 1))
            coming = receive_buffer(shares, schedule.passed_on(following, hop + 1))
            self._partial_sums = exchange(
                group,
                sends=[(schedule.holder(owner, hop + 1), leaving)],
                receives=[(schedule.holder(following, hop), coming)],
            )
        completed = schedule.completed(owner, hop)
        self._return(hop, select_rows(shares, held, completed), completed, schedule.completed(group.rank, hop))

    def _return(self, hop: int, shares: Tensor, leaving: Rows, coming: Rows) -> None:
        pending = return_to_owner((shares,), hop, leaving, coming, self._schedule, self._group)
        self._in_flight.append((coming, pending))
        while len(self._in_flight) > self._max_in_flight:
            self._receive()

    def _receive(self) -> None:
        rows, pending = self._in_flight.popleft()
        self._add(rows, pending.wait()[0])

    def _add(self, rows: Rows, shares: Tensor) -> None:
        for whole, share in zip(self._grads, shares, strict=True):
            rows.add_to(whole, share)


def select_rows(part: Tensor, rows: Rows, kept: Rows) -> Tensor:
    """Returns the rows ``kept`` of a tensor that holds ``rows``; the tensor itself if that is all of them.

    Some of them are a copy: a view in flight would keep the whole tensor in memory.
    """
    if kept == rows:
        return part
    places = kept.inside(rows)
    taken = places.take(part, ROWS)
    return taken.clone(memory_format=torch.contiguous_format) if len(places.intervals) == 1 else taken


def receive_buffer(part: Tensor, rows: Rows) -> Tensor:
    """Returns a buffer for these rows, like a tensor of another block."""
    return part.new_empty(*part.shape[:ROWS], len(rows), *part.shape[ROWS + 1 :])


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(like.shape, dtype=dtype)


def count_rows(messages: list[tuple[int, Rows]]) -> tuple[int, int]:
    """Returns how many rows these messages carry together, and how many messages they are."""
    return sum(len(rows) for _, rows in messages), len(messages)
