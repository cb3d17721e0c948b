"""Describes a group of ranks that share one sequence, and counts what they have sent."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from longctx.comm.nodes import node_of


class ExchangeEvent(NamedTuple):
    """An exchange as it was posted or awaited; ``started`` and ``ended`` are seconds of ``time.perf_counter``.

    ``number`` counts the group's exchanges. ``sends`` and ``receives``: ranks of the group, one for each message; empty
    when awaited.
    """

    posted: bool
    number: int
    started: float
    ended: float
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()


@dataclass
class Traffic:
    """Counts what this rank sent through one group: payload bytes and messages.

    Each exchange states its own convention for bytes. ``by_receiver``: the bytes by the receiver's global rank.
    ``timeline``: exchanges in the rank's own order, where someone has put a list.
    """

    bytes: int = 0
    messages: int = 0
    by_receiver: dict[int, int] = field(default_factory=dict)
    timeline: list[ExchangeEvent] | None = None

    def add(self, size: int, receiver: int) -> None:
        self.bytes += size
        self.messages += 1
        self.by_receiver[receiver] = self.by_receiver.get(receiver, 0) + size


_traffic: weakref.WeakKeyDictionary[dist.ProcessGroup, Traffic] = weakref.WeakKeyDictionary()
_SEPARATOR = "|"  # of a group's name, and of those of its axes and its other channel
_ABSENT = "-"


@dataclass(frozen=True)
class Group:
    """Ranks that are numbered 0 to size - 1 within the group; without a process group, this process alone.

    A grid also knows its axes. Rank ``i * inner.size + j`` is the j-th of its ``inner`` group (neighbours, ranks of one
    node). It is the i-th of its ``outer`` group. ``back``: a separate channel over all the ranks, for what must not
    wait for messages of the group itself.
    """

    process_group: dist.ProcessGroup | None
    rank: int
    size: int
    inner: Group | None = None
    outer: Group | None = None
    back: Group | None = None

    @property
    def name(self) -> str:
        """The group's name, which passes through custom operators as a string; empty for a single process."""
        own = "" if self.process_group is None else self.process_group.group_name
        others = (self.inner, self.outer, self.back)
        if others == (None, None, None):
            return own
        return _SEPARATOR.join([own, *(_ABSENT if group is None else group.name for group in others)])

    @property
    def others(self) -> list[int]:
        """Every rank of the group but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent through the group, all axes together."""
        if self.process_group is None:
            return Traffic()
        return _traffic.setdefault(self.process_group, Traffic())

    @property
    def ranks(self) -> list[int]:
        """The global ranks of the group's members."""
        return [0] if self.process_group is None else dist.get_process_group_ranks(self.process_group)

    @property
    def bytes_between_nodes(self) -> int:
        """Bytes that this rank sent through the group to ranks of other nodes."""
        sent = self.traffic.by_receiver.items()
        return sum(size for receiver, size in sent if node_of(receiver) != node_of(dist.get_rank()))


def group_of(process_group: dist.ProcessGroup | None) -> Group:
    """Returns the group of a process group, or that of this process alone for None."""
    if process_group is None:
        return Group(None, 0, 1)
    return Group(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


def group_named(name: str) -> Group:
    """Returns the group that has this ``Group.name`` on this rank."""
    own, *others = name.split(_SEPARATOR)
    group = group_of(_resolve_process_group(GroupName(own)) if own else None)
    if not others:
        return group
    inner, outer, back = (None if other == _ABSENT else group_named(other) for other in others)
    return replace(group, inner=inner, outer=outer, back=back)


def grid_of(process_group: dist.ProcessGroup | None, inner: int) -> Group:
    """Returns the group as a grid of ``size / inner`` rows of ``inner`` neighbours.

    All its ranks call it at the same point. The axes have process groups of their own, so that what travels along one
    never waits for the other. They count into the traffic of the whole. Made once per group and size.
    """
    whole, alone = group_of(process_group), Group(None, 0, 1)
    assert whole.size % inner == 0, f"{inner} does not divide {whole.size} ranks; the registry refuses it"
    if inner == 1:
        return replace(whole, inner=alone, outer=whole)
    if inner == whole.size:
        return replace(whole, inner=whole, outer=alone)
    assert process_group is not None, "one process has no axes"
    made = _grids.setdefault(process_group, {})
    if inner not in made:
        ranks = dist.get_process_group_ranks(process_group)
        row, column = divmod(whole.rank, inner)
        made[inner] = (
            _subgroup(ranks[row * inner : (row + 1) * inner], whole),
            _subgroup(ranks[column::inner], whole),
        )
    return replace(whole, inner=group_of(made[inner][0]), outer=group_of(made[inner][1]))


def two_way(group: Group) -> Group:
    """Returns the group with its separate channel ``back``, made once per group.

    All its ranks call it at the same point.
    """
    if group.process_group is None:
        return replace(group, back=Group(None, 0, 1))
    return replace(group, back=channel_of(group.process_group, group.process_group))


def channel_of(ranks: dist.ProcessGroup, counted: dist.ProcessGroup) -> Group:
    """Returns a separate channel between these ranks, for what must not wait for their other messages.

    What is sent counts into the traffic of ``counted``. All of the ranks call it at the same point. Made once per
    group.
    """
    if ranks not in _channels:
        _channels[ranks] = _subgroup(dist.get_process_group_ranks(ranks), group_of(counted))
    return group_of(_channels[ranks])


_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
_grids: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]]] = (
    weakref.WeakKeyDictionary()
)


def _subgroup(ranks: list[int], whole: Group) -> dist.ProcessGroup:
    """Makes a process group of some ranks; only its members need to call it."""
    made = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup), "a rank makes groups that it belongs to"
    _traffic[made] = whole.traffic
    return made
