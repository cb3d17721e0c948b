"""Exchanges that strategies use; the only place in longctx where attention's tensors leave a rank."""

from longctx.comm.exchange import Message, Pending, exchange
from longctx.comm.group import Group, Traffic, grid_of, group_named, group_of, two_way

__all__ = ["Group", "Message", "Pending", "Traffic", "exchange", "grid_of", "group_named", "group_of", "two_way"]
