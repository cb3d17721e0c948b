"""Ring schedules: which rank holds which rows of which block, hop by hop around a ring.

Block ``owner`` starts at its owner (hop 0) and moves one neighbour per hop. At each hop it carries only rows that the
holder or some later one reads (but is not cut for a trifle). It stops after its last reader. Its gradients move the
same way one hop behind and return from the last reader of each row. The direction is whichever moves fewer rows. Causal
zigzag turns downwards, where the later half of a block drops out after the wrap (a quarter of the bytes saved). A
contiguous causal block never wraps at all (half the bytes).

On a grid, rows of ``lap`` neighbours, the ring is double (BurstAttention). A block goes round one row of ranks, a lap.
Meanwhile a copy of it crosses to the same place in the next row, where the next lap begins. What only later laps read
leaves with the copy; gradients are summed along a lap and return from there. One row is a plain ring of neighbours,
rows of one rank are a plain ring of crossings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from longctx.sequence.plan import SequencePlan
from longctx.sequence.rows import Rows
from longctx.sequence.views import view


@dataclass(frozen=True)
class Stop:
    """Describes a block at one hop, as sets of local rows of its owner.

    ``carried``: what the block holds. ``summed``: those that the holder or a later one of this lap reads, so that
    their gradients are in flight. ``read``: those that the holder itself reads. Neither is cut for a trifle.
    """

    carried: Rows
    summed: Rows
    read: Rows


NOWHERE = Stop(Rows(), Rows(), Rows())


@dataclass(frozen=True)
class RingSchedule:
    """Says which rank holds which rows of which block at each hop.

    ``stops[owner][hop]``: the owner's block; at hop 0 all its valid rows. ``directions``: whether blocks move up (+1)
    or down (-1), across rows of ranks and along a row.
    """

    lap: int
    directions: tuple[int, int]
    stops: tuple[tuple[Stop, ...], ...]

    @property
    def world(self) -> int:
        return len(self.stops)

    @property
    def direction(self) -> int:
        """Returns the direction of a plain ring: +1, blocks move to the next rank, or -1, to the one before."""
        return self.directions[0] if self.lap == 1 else self.directions[1]

    def holder(self, owner: int, hop: int) -> int:
        """Returns the rank that holds ``owner``'s block at ``hop``."""
        return _moved(owner, hop, self.directions, self.lap, self.world)

    def owner(self, rank: int, hop: int) -> int:
        """Returns the owner of the block that ``rank`` holds at ``hop``."""
        return _moved(rank, -hop, self.directions, self.lap, self.world)

    def at(self, owner: int, hop: int) -> Stop:
        """Returns ``owner``'s block at ``hop``; empty from the hop after its last reader on."""
        return self.stops[owner][hop] if hop < self.world else NOWHERE

    def carried(self, owner: int, hop: int) -> Rows:
        """Returns the rows of ``owner``'s block at ``hop``."""
        return self.at(owner, hop).carried

    def passed_on(self, owner: int, hop: int) -> Rows:
        """Returns the rows whose gradients are sent on to the block's holder at ``hop``: none at a lap's start."""
        return self.at(owner, hop).summed if hop % self.lap else Rows()

    def completed(self, owner: int, hop: int) -> Rows:
        """Returns the rows whose gradients are complete at ``hop``: the holder is their last reader in this lap."""
        return self.at(owner, hop).summed - self.passed_on(owner, hop + 1)

    def block_messages(self, rank: int) -> list[tuple[int, Rows]]:
        """Returns receiver and rows of each message with a block from ``rank``; empty ones are not sent."""
        found = []
        for hop in range(self.world):
            owner = self.owner(rank, hop)
            if hop % self.lap == 0:
                found.append((owner, hop + self.lap))
            if (hop + 1) % self.lap:
                found.append((owner, hop + 1))
        sent = [(self.holder(owner, to), self.carried(owner, to)) for owner, to in found]
        return [(receiver, rows) for receiver, rows in sent if rows]

    def gradient_messages(self, rank: int, direct: bool) -> list[tuple[int, Rows]]:
        """Returns receiver and rows of each message with gradients from ``rank``; empty ones are not sent.

        ``direct``: each holder's share returns by itself, of the rows that it reads.
        """
        sent = []
        for hop in range(1, self.world):
            owner = self.owner(rank, hop)
            if direct:
                sent.append((owner, self.at(owner, hop).read))
            else:
                sent.append((self.holder(owner, hop + 1), self.passed_on(owner, hop + 1)))
                sent.append((owner, self.completed(owner, hop)))
        return [(receiver, rows) for receiver, rows in sent if rows]

    def rows_sent(self, rank: int) -> int:
        """Returns the rows of blocks that ``rank`` sends on in one pass around the ring."""
        return sum(len(rows) for _, rows in self.block_messages(rank))

    @cached_property
    def cost(self) -> tuple[int, int]:
        """Returns the rows that all ranks together send on, across rows of ranks and along them."""
        hops = [(hop, len(block[hop].carried)) for block in self.stops for hop in range(1, self.world)]
        return sum(n for hop, n in hops if hop % self.lap == 0), sum(n for hop, n in hops if hop % self.lap)

    @cached_property
    def gradient_rows(self) -> tuple[int, int]:
        """Returns the rows of gradients that all ranks together send: summed on their way, and directly."""
        stops = [stop for block in self.stops for stop in block[1:]]
        return sum(len(stop.summed) for stop in stops), sum(len(stop.read) for stop in stops)


def key_ring(plan: SequencePlan, lap: int | None = None) -> RingSchedule:
    """Returns how blocks of keys and values rotate, around all ranks or in a double ring of rows of ``lap`` ranks."""
    return _ring(plan, "keys", lap or plan.world)


def query_ring(plan: SequencePlan, lap: int | None = None) -> RingSchedule:
    """Returns how blocks of queries rotate, around all ranks or in a double ring of rows of ``lap`` ranks."""
    return _ring(plan, "queries", lap or plan.world)


@view
def _ring(plan: SequencePlan, what: str, lap: int) -> RingSchedule:
    reads = plan.reads if what == "keys" else lambda reader, owner: plan.sees(owner, reader)
    return plan_schedule(reads, [len(plan.positions(rank)) for rank in range(plan.world)], lap)


def _moved(rank: int, hops: int, directions: tuple[int, int], lap: int, world: int) -> int:
    """``rank`` after so many hops of a double ring; fewer than 0 lead back."""
    (row, place), (laps, steps) = divmod(rank, lap), divmod(abs(hops), lap)
    sign = 1 if hops >= 0 else -1
    return (row + sign * directions[0] * laps) % (world // lap) * lap + (place + sign * directions[1] * steps) % lap


def plan_schedule(reads: Callable[[int, int], Rows], shards: Sequence[int], lap: int) -> RingSchedule:
    """Returns the cheapest schedule for ``reads(reader, owner)``, the rows that each rank reads of each other.

    ``shards``: valid rows of each rank. The cheapest directions move the fewest rows across, which is where links are
    slow, then along; +1 on a tie.
    """
    world = len(shards)
    either, irrelevant = (+1, -1), (+1,)
    turned = [
        RingSchedule(lap, directions, tuple(_route(reads, shards, owner, lap, directions) for owner in range(world)))
        for directions in itertools.product(either if lap < world else irrelevant, either if lap > 1 else irrelevant)
    ]
    return min(turned, key=lambda schedule: schedule.cost)


def _route(
    reads: Callable[[int, int], Rows], shards: Sequence[int], owner: int, lap: int, directions: tuple[int, int]
) -> tuple[Stop, ...]:
    """The stops of one block."""
    world = len(shards)
    own = [reads(_moved(owner, hop, directions, lap, world), owner) for hop in range(world)]
    to_lap_end = [*own]  # what the holder or a later one of its lap reads
    for hop in range(world - 2, -1, -1):
        if (hop + 1) % lap:
            to_lap_end[hop] |= to_lap_end[hop + 1]
    to_end = to_lap_end[::lap]  # by lap: what it or a later one reads
    for number in range(len(to_end) - 2, -1, -1):
        to_end[number] |= to_end[number + 1]
    block = Rows(((0, shards[owner]),)) if shards[owner] else Rows()
    stops = []
    for hop in range(world):
        if hop % lap == 0:
            block = trimmed_rows(block, to_end[hop // lap]) if hop else block
            inside = trimmed_rows(block, to_lap_end[hop]) if hop else block
        else:
            inside = trimmed_rows(inside, to_lap_end[hop])
        stops.append(Stop(inside if hop % lap else block, inside, trimmed_rows(inside, own[hop])))
    return tuple(stops)


def trimmed_rows(block: Rows, needed: Rows) -> Rows:
    """Returns ``needed``, or the whole block where a cut would save one row or less than a thirty-second.

    A block that nobody reads stops.
    """
    dropped = len(block) - len(needed)
    return needed if not needed or dropped > max(1, len(block) // 32) else block
