"""Collectives on small tensors that all ranks of a group need.

Convention for bytes, as of bandwidth-optimal algorithms: an all-reduce of n bytes costs each of P ranks
2 (P - 1) / P n, rounded down; a broadcast goes along a chain and costs each rank but the last n; both are sent to the
next rank. A group of one rank and an empty tensor cost nothing, and nothing is called.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from longctx.comm.group import Group

SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


def all_reduce(group: Group, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """``tensor`` itself, reduced in place over all ranks, bit by bit the same on each."""
    if group.size > 1 and tensor.numel():
        dist.all_reduce(tensor, operation, group=group.process_group)
        group.traffic.add(2 * (group.size - 1) * tensor.numel() * tensor.element_size() // group.size, _next(group))
    return tensor


def broadcast(group: Group, tensor: Tensor, source: int) -> Tensor:
    """``tensor`` itself, overwritten with that of rank ``source`` of the group."""
    if group.size > 1 and tensor.numel():
        dist.broadcast(tensor, group_src=source, group=group.process_group)
        if (group.rank + 1) % group.size != source:
            group.traffic.add(tensor.numel() * tensor.element_size(), _next(group))
    return tensor


def _next(group: Group) -> int:
    """The global rank of the group's following member."""
    assert group.process_group is not None, "one process has nobody to send to"
    return dist.get_global_rank(group.process_group, (group.rank + 1) % group.size)
