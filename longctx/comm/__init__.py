"""Exchanges tensors between ranks; the only place in longctx where attention's tensors leave a rank."""

from longctx.comm.collective import MAX, SUM, PendingReduction, all_reduce, broadcast, start_all_reduce
from longctx.comm.exchange import Message, Pending, exchange
from longctx.comm.group import ExchangeEvent, Group, Traffic, channel_of, grid_of, group_named, group_of, two_way
from longctx.comm.leaving import leave_world
from longctx.comm.nodes import Links, links_of, node_of, per_node, register_nodes
from longctx.comm.relay import Relay
from longctx.comm.store import default_store

__all__ = [
    "MAX",
    "SUM",
    "ExchangeEvent",
    "Group",
    "Links",
    "Message",
    "Pending",
    "PendingReduction",
    "Relay",
    "Traffic",
    "all_reduce",
    "broadcast",
    "channel_of",
    "default_store",
    "exchange",
    "grid_of",
    "group_named",
    "group_of",
    "leave_world",
    "links_of",
    "node_of",
    "per_node",
    "register_nodes",
    "start_all_reduce",
    "two_way",
]
