"""Exchanges that strategies use; the only place in longctx where attention's tensors leave a rank."""

from longctx.comm.collective import MAX, SUM, all_reduce, broadcast
from longctx.comm.exchange import Message, Pending, exchange
from longctx.comm.group import Group, Traffic, grid_of, group_named, group_of, outer_name, two_way

__all__ = [
    "MAX",
    "SUM",
    "Group",
    "Message",
    "Pending",
    "Traffic",
    "all_reduce",
    "broadcast",
    "exchange",
    "grid_of",
    "group_named",
    "group_of",
    "outer_name",
    "two_way",
]
