"""Rows that the ring transport (``runtime.ring_transport``) keeps in memory: of blocks, and of gradients in flight.

A tensor that is sent lives until its message is awaited, a received one from then on. ``tests/volume`` holds these
counts to what is alive on ``sim``.
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import RingSchedule


def blocks_alive(schedule: RingSchedule, rank: int) -> list[int]:
    """Returns, by hop, how many rows of blocks are in memory.

    It counts the block at hand, those that come and cross, and copies where what is sent on was cut.
    """
    found, crossing, crossed = [], 0, 0
    for hop in range(schedule.world):
        here, moving = len(schedule.carried(schedule.owner(rank, hop), hop)), 0
        if hop % schedule.lap == 0:
            crossing, crossed = _in_flight(schedule, rank, hop, hop + schedule.lap)
        if (hop + 1) % schedule.lap:
            moving, _ = _in_flight(schedule, rank, hop, hop + 1)
        # The block that crosses uncut is the one at hand until it has moved on.
        found.append(here + moving + crossing + (crossed if hop % schedule.lap else 0))
    return found


def _in_flight(schedule: RingSchedule, rank: int, hop: int, to: int) -> tuple[int, int]:
    """Rows of the block that comes and of the copy that leaves; and of the block itself if that leaves."""
    here, leaving = (len(schedule.carried(schedule.owner(rank, hop), when)) for when in (hop, to))
    coming, cut = len(schedule.carried(schedule.owner(rank, to), to)), leaving < here
    return (coming + leaving, 0) if cut else (coming, leaving)


@dataclass(frozen=True)
class GradientsAlive:
    """Counts rows of visiting blocks' gradients that are in memory at one hop, at four moments.

    The moments: while the next ones are allocated, computed, converted, and sent. Each pair counts those in the
    accumulation dtype, and those that return directly, in the dtype in which they are sent.
    """

    allocating: tuple[int, int]
    computing: tuple[int, int]
    converting: tuple[int, int]
    sending: tuple[int, int]


def alive_on_way(schedule: RingSchedule, rank: int, direct: bool, sizes: Sizes) -> list[GradientsAlive]:
    """Returns, by hop, the gradients of visiting blocks that are in memory.

    ``direct``: they return to owners one by one; otherwise they are summed on their way.
    """
    if not direct:
        return gradients_alive(schedule, rank)
    return direct_alive(schedule, rank, sizes.options.grad_dtype == "compute" and sizes.element < sizes.wide)


def gradients_alive(schedule: RingSchedule, rank: int) -> list[GradientsAlive]:
    """Returns, by hop, the gradients that ``GradientReturn`` sums on their way, beside the rank's own."""
    found, before, passed_on, coming = [GradientsAlive((0, 0), (0, 0), (0, 0), (0, 0))], 0, 0, 0
    returned: list[int] = []  # returning to owners and coming back, by hop
    most = schedule.lap if schedule.lap < schedule.world else 1
    for hop in range(1, schedule.world):
        owner, following = (schedule.owner(rank, when) for when in (hop, hop + 1))
        stop = schedule.at(owner, hop)
        shares, summed = len(stop.carried), len(stop.summed)
        returning, in_flight = len(schedule.completed(rank, hop)), sum(returned[-most:])
        computing = shares + passed_on + coming + in_flight
        passed_on, coming = len(schedule.passed_on(owner, hop + 1)), len(schedule.passed_on(following, hop + 1))
        copies = (summed if summed < shares else 0) + (summed if 0 < passed_on < summed else 0)
        sending = shares + copies + coming + in_flight + returning
        found.append(GradientsAlive((computing + before, 0), (computing, 0), (computing, 0), (sending, 0)))
        before = 0 if shares == summed in (passed_on, summed - passed_on) else shares
        returned.append(summed - passed_on + returning)
    return found


def direct_alive(schedule: RingSchedule, rank: int, converted: bool) -> list[GradientsAlive]:
    """Returns, by hop, the gradients that ``GradientReturn`` returns directly, beside the rank's own.

    ``converted``: they are sent in another dtype.
    """
    found, before, in_flight = [GradientsAlive((0, 0), (0, 0), (0, 0), (0, 0))], 0, 0
    for hop in range(1, schedule.world):
        stop = schedule.at(schedule.owner(rank, hop), hop)
        shares, read, returning = len(stop.carried), len(stop.read), len(schedule.at(rank, hop).read)
        copy = read if read < shares else 0
        leaving = in_flight + (read if converted else copy)
        converting = (shares + copy, leaving) if converted else (shares, in_flight)
        found.append(
            GradientsAlive((shares + before, in_flight), (shares, in_flight), converting, (shares, leaving + returning))
        )
        before, in_flight = (shares if converted or copy else 0), read + returning
    return found
