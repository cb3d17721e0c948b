"""Describes what a plan costs: the sizes of a layer, a cluster's shape and rates, and a report on work and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longctx.errors import ConfigError
from longctx.planner.slices import Int64


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer, as a server group sees it; the default is that of an 8B model.

    ``element``: bytes per number (2 is bf16).
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    element: int = 2

    @property
    def row(self) -> int:
        """Bytes of Q, O, dO or dQ of one token."""
        return self.heads * self.head_dim * self.element

    @property
    def kv(self) -> int:
        """Bytes of K and V (or dK and dV) of one token."""
        return 2 * self.kv_heads * self.head_dim * self.element

    @property
    def lse(self) -> int:
        """Bytes of the fp32 log-sum-exps of one token's heads."""
        return 4 * self.heads


@dataclass(frozen=True)
class Topology:
    """A cluster of ``servers`` ranks, of which ``per_node`` consecutive ones share a node.

    Rates are bytes/s of one rank. ``link``: between ranks of a node. ``nic``: one NIC between nodes; a node has
    ``nics`` of them.
    """

    servers: int
    per_node: int = 8
    link: float = 450e9
    nic: float = 50e9
    nics: int = 8

    def __post_init__(self) -> None:
        if self.servers < 1 or self.per_node < 1 or self.nics < 1 or min(self.link, self.nic) <= 0:
            raise ConfigError(f"{self} must have at least one server, one per node, one NIC and rates above 0")

    @property
    def nodes(self) -> int:
        return -(-self.servers // self.per_node)

    def node(self, rank: Int64) -> Int64:
        """Returns the node of each rank."""
        return np.asarray(rank // self.per_node, dtype=np.int64)


@dataclass(frozen=True)
class CostReport:
    """What a plan costs for one layer: work and bytes; only what leaves a rank counts, never what stays.

    ``work``: visible cells per server, heads groups counted as fractions, int64 ``[W]`` times ``groups``.
    ``q_sent``, ``q_received``, ``kv_sent``, ``kv_received``: (token, heads group) rows of each rank, int64 ``[W]``. A
    query row crosses once per (row, server), a KV token once per (token, server), however many tasks there read it.

    Bytes are summed over ranks, of a whole server group; divide by the tensor-parallel degree for one device. Forward
    sends Q to servers ``q`` and K and V to servers ``kv``. O comes back ``o`` (as many as Q) with its log-sum-exp
    ``lse``.

    In the backward pass servers are stateless and keep nothing. dO, O, Q and lse go to servers, K and V again. dQ, dK
    and dV come back (copies of one server summed before). That is ``4 q + lse + 2 kv``.

    ``moved`` is ``q + o + kv``, the figure that DistCA's planner is compared by. The log-sum-exp (1/64 of O at head_dim
    128 in bf16) stands beside it.
    """

    work: Int64
    q_sent: Int64
    q_received: Int64
    kv_sent: Int64
    kv_received: Int64
    groups: int
    widths: AttentionShape

    @property
    def imbalance(self) -> float:
        """Maximum over mean work of the servers; 1 where there is no work."""
        return float(self.work.max() / self.work.mean()) if self.work.any() else 1.0

    @property
    def q(self) -> int:
        return int(self.q_sent.sum()) * self.widths.row // self.groups

    @property
    def o(self) -> int:
        return self.q

    @property
    def lse(self) -> int:
        return int(self.q_sent.sum()) * self.widths.lse // self.groups

    @property
    def kv(self) -> int:
        return int(self.kv_sent.sum()) * self.widths.kv // self.groups

    @property
    def moved(self) -> int:
        return self.q + self.o + self.kv

    @property
    def forward(self) -> int:
        return self.moved + self.lse

    @property
    def backward(self) -> int:
        return 4 * self.q + self.lse + 2 * self.kv

    @property
    def sent(self) -> Int64:
        """Forward bytes of ``moved`` that each rank sends: its own Q and KV, and the O of others, int64 ``[W]``."""
        rows = self.q_sent + self.q_received
        return np.asarray((rows * self.widths.row + self.kv_sent * self.widths.kv) // self.groups, dtype=np.int64)

    @property
    def received(self) -> Int64:
        """Forward bytes of ``moved`` that each rank receives, int64 ``[W]``."""
        rows = self.q_sent + self.q_received
        return np.asarray((rows * self.widths.row + self.kv_received * self.widths.kv) // self.groups, dtype=np.int64)
