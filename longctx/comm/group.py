"""A group of ranks that share one sequence, and what they have sent."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group


@dataclass
class Traffic:
    """What this rank sent through one group: payload bytes and messages, by the conventions of each exchange."""

    bytes: int = 0
    messages: int = 0

    def add(self, size: int) -> None:
        self.bytes += size
        self.messages += 1


_traffic: weakref.WeakKeyDictionary[dist.ProcessGroup, Traffic] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Group:
    """Ranks numbered 0..size-1 within the group. Without a process group: this process alone."""

    process_group: dist.ProcessGroup | None
    rank: int
    size: int

    @property
    def name(self) -> str:
        """Passes through custom operators as a string; empty for a single process."""
        return "" if self.process_group is None else self.process_group.group_name

    @property
    def traffic(self) -> Traffic:
        if self.process_group is None:
            return Traffic()
        return _traffic.setdefault(self.process_group, Traffic())


def group_of(process_group: dist.ProcessGroup | None) -> Group:
    if process_group is None:
        return Group(None, 0, 1)
    return Group(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


def group_named(name: str) -> Group:
    """The group that ``Group.name`` named on this rank."""
    return group_of(_resolve_process_group(GroupName(name)) if name else None)
