"""Runs collectives on small tensors that all ranks of a group need.

Bytes are counted as in bandwidth-optimal algorithms. An all-reduce of n bytes costs each of P ranks
2 (P - 1) / P n, rounded down. A broadcast goes along a chain and costs each rank but the last n. Both are sent to the
next rank. A group of one rank and an empty tensor cost nothing, and nothing is called.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from longctx.comm.group import Group

SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


def all_reduce(group: Group, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduces ``tensor`` in place over all ranks and returns it, bit by bit the same on each."""
    return start_all_reduce(group, tensor, operation).wait()


class PendingReduction:
    """A reduction in flight; nobody reads or writes its tensor until it is awaited."""

    def __init__(self, work: dist.Work | None, tensor: Tensor) -> None:
        self._work = work
        self._tensor = tensor
        self._awaited = False

    def wait(self) -> Tensor:
        """Returns the tensor, reduced in place; on CUDA the current stream waits, not the host."""
        assert not self._awaited, "a pending reduction is awaited exactly once"
        self._awaited = True
        if self._work is not None:
            self._work.wait()
        return self._tensor


def start_all_reduce(group: Group, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> PendingReduction:
    """Starts an all-reduce and returns at once."""
    work = None
    if group.size > 1 and tensor.numel():
        work = dist.all_reduce(tensor, operation, group=group.process_group, async_op=True)
        group.traffic.add(2 * (group.size - 1) * tensor.numel() * tensor.element_size() // group.size, _next(group))
    return PendingReduction(work, tensor)


def broadcast(group: Group, tensor: Tensor, source: int) -> Tensor:
    """Overwrites ``tensor`` with that of rank ``source`` of the group and returns it."""
    if group.size > 1 and tensor.numel():
        dist.broadcast(tensor, group_src=source, group=group.process_group)
        if (group.rank + 1) % group.size != source:
            group.traffic.add(tensor.numel() * tensor.element_size(), _next(group))
    return tensor


def _next(group: Group) -> int:
    """Returns the global rank of the group's following member."""
    assert group.process_group is not None, "one process has nobody to send to"
    return dist.get_global_rank(group.process_group, (group.rank + 1) % group.size)
