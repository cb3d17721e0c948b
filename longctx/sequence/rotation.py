"""The route of key/value blocks around a ring: who holds which rows at which hop.

Block ``owner`` starts at its owner (hop 0) and moves one neighbour per hop. At hop h it carries only rows
that the holder or some later one reads (but is not cut for a trifle), and it stops after its last reader;
its gradients travel the same hops one step behind and go home from the last reader of each row. The
direction is whichever moves fewer rows: causal zigzag turns downwards, where the later half of a block drops
out after the wrap (a quarter of the bytes saved); a contiguous causal block never wraps at all (half the
bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.sequence.rows import Rows


@dataclass(frozen=True)
class Rotation:
    """``needs[owner][hop]``: local rows of the owner that the block carries when it arrives at that hop.

    Hop 0 is all valid rows of the owner.
    """

    direction: int  # +1: blocks move to the next rank, -1: to the one before
    needs: tuple[tuple[Rows, ...], ...]

    @property
    def world(self) -> int:
        return len(self.needs)

    def holder(self, owner: int, hop: int) -> int:
        """Rank that holds ``owner``'s block at ``hop``."""
        return (owner + self.direction * hop) % self.world

    def owner(self, rank: int, hop: int) -> int:
        """Owner of the block that ``rank`` holds at ``hop``."""
        return (rank - self.direction * hop) % self.world

    def carried(self, owner: int, hop: int) -> Rows:
        """Rows of ``owner``'s block at ``hop``; none from the hop after its last reader on."""
        return self.needs[owner][hop] if hop < self.world else Rows()

    def ended(self, owner: int, hop: int) -> Rows:
        """Rows whose last reader is the holder at ``hop``: their gradients are complete and go home."""
        return self.carried(owner, hop) - self.carried(owner, hop + 1)

    def rows_sent(self, rank: int) -> int:
        """Rows of keys (and as many of values) that ``rank`` passes on in one pass around the ring."""
        return sum(len(self.carried(self.owner(rank, hop), hop + 1)) for hop in range(self.world))

    def gradient_rows_sent(self, rank: int) -> int:
        """Rows of dk (and as many of dv) that ``rank`` passes on or sends home: one per row held after hop 0."""
        return sum(len(self.carried(self.owner(rank, hop), hop)) for hop in range(1, self.world))


def plan_rotation(reads: Callable[[int, int], Rows], shards: Sequence[int]) -> Rotation:
    """The cheaper direction for ``reads(reader, owner)``, the rows that each rank reads of each other; +1 on a tie.

    ``shards``: valid rows of each rank.
    """
    world = len(shards)

    def turned(direction: int) -> Rotation:
        return Rotation(direction, tuple(carried(owner, direction) for owner in range(world)))

    def carried(owner: int, direction: int) -> tuple[Rows, ...]:
        exact = [Rows()] * (world + 1)
        for hop in range(world - 1, 0, -1):
            exact[hop] = exact[hop + 1] | reads((owner + direction * hop) % world, owner)
        block = Rows(((0, shards[owner]),)) if shards[owner] else Rows()
        needs = [block]
        for hop in range(1, world):
            if worth_narrowing(block, exact[hop]):
                block = exact[hop]
            needs.append(block)
        return tuple(needs)

    def cost(rotation: Rotation) -> int:
        return sum(rotation.rows_sent(rank) for rank in range(world))

    return min(turned(+1), turned(-1), key=cost)


def worth_narrowing(block: Rows, needed: Rows) -> bool:
    """A block that would lose a row or a thirty-second goes on as it came, without a copy; an unread one stops."""
    dropped = len(block) - len(needed)
    return not needed or dropped > max(1, len(block) // 32)
