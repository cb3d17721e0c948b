"""What ``runtime.ring_transport`` keeps in memory: rows of travelling blocks, and of gradients on their way home.

A tensor that is sent lives until its message is awaited, a received one from then on; ``tests/volume`` holds these
counts to what is alive on ``sim``.
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import RingSchedule


def blocks_alive(rotation: RingSchedule, rank: int) -> list[int]:
    """By hop: rows of the blocks at hand, coming and crossing, and of copies, where what is sent on was cut."""
    found, crossing, crossed = [], 0, 0
    for hop in range(rotation.world):
        here, moving = len(rotation.carried(rotation.owner(rank, hop), hop)), 0
        if hop % rotation.lap == 0:
            crossing, crossed = _in_flight(rotation, rank, hop, hop + rotation.lap)
        if (hop + 1) % rotation.lap:
            moving, _ = _in_flight(rotation, rank, hop, hop + 1)
        # The block that crosses uncut is the one at hand until it has moved on.
        found.append(here + moving + crossing + (crossed if hop % rotation.lap else 0))
    return found


def _in_flight(rotation: RingSchedule, rank: int, hop: int, to: int) -> tuple[int, int]:
    """Rows of the block that comes and of the copy that leaves; and of the block itself if that leaves."""
    here, leaving = (len(rotation.carried(rotation.owner(rank, hop), when)) for when in (hop, to))
    coming, cut = len(rotation.carried(rotation.owner(rank, to), to)), leaving < here
    return (coming + leaving, 0) if cut else (coming, leaving)


@dataclass(frozen=True)
class GradientsAlive:
    """Rows of visiting blocks' gradients at one hop, as they are summed and as they go home (``direct``), while
    room is made for the next, while they are computed, and while they are sent."""

    room: tuple[int, int]
    computing: tuple[int, int]
    sending: tuple[int, int]


def alive_on_way(rotation: RingSchedule, rank: int, direct: bool, sizes: Sizes) -> list[GradientsAlive]:
    """By hop, of gradients of visiting blocks that are summed on their way or go home directly."""
    if not direct:
        return gradients_alive(rotation, rank)
    return direct_alive(rotation, rank, sizes.options.grad_dtype == "compute" and sizes.element < sizes.wide)


def gradients_alive(rotation: RingSchedule, rank: int) -> list[GradientsAlive]:
    """By hop: those that ``GradientReturn`` sums on their way, beside its own."""
    found, before, riding, coming = [GradientsAlive((0, 0), (0, 0), (0, 0))], 0, 0, 0
    homes: list[int] = []  # going home and coming, by hop
    most = rotation.lap if rotation.lap < rotation.world else 1
    for hop in range(1, rotation.world):
        owner, following = (rotation.owner(rank, when) for when in (hop, hop + 1))
        stop = rotation.at(owner, hop)
        shares, summed = len(stop.carried), len(stop.summed)
        home, under_way = len(rotation.ended(rank, hop)), sum(homes[-most:])
        computing = shares + riding + coming + under_way
        riding, coming = len(rotation.riding(owner, hop + 1)), len(rotation.riding(following, hop + 1))
        copies = (summed if summed < shares else 0) + (summed if 0 < riding < summed else 0)
        sending = shares + copies + coming + under_way + home
        found.append(GradientsAlive((computing + before, 0), (computing, 0), (sending, 0)))
        before = 0 if shares == summed in (riding, summed - riding) else shares
        homes.append(summed - riding + home)
    return found


def direct_alive(rotation: RingSchedule, rank: int, converted: bool) -> list[GradientsAlive]:
    """By hop: those that ``GradientReturn`` sends home directly, beside its own. ``converted``: to another dtype."""
    found, before, under_way = [GradientsAlive((0, 0), (0, 0), (0, 0))], 0, 0
    for hop in range(1, rotation.world):
        stop = rotation.at(rotation.owner(rank, hop), hop)
        shares, read, home = len(stop.carried), len(stop.read), len(rotation.at(rank, hop).read)
        copy = read if read < shares else 0
        sending = (shares + copy, under_way + read + home) if converted else (shares, under_way + copy + home)
        found.append(GradientsAlive((shares + before, under_way), (shares, under_way), sending))
        before, under_way = (shares if converted or copy else 0), read + home
    return found
