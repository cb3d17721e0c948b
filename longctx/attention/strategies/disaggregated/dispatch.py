"""A plan as its executor reads it: rows of tensors, places in buffers and tiles, worked out from ``planner.RankPlan``.

Three types say which rows go where. ``planner.DocumentPlacement``: on which local rows of which rank each token lives;
local rows are those of its tensors of all batch rows, ``[B * T/SP]``, of G heads groups one after another.
``planner.RankTransfers``: which of them a rank sends to whom, as integers. ``Crossing``: the same as copies of tensors
into buffers and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longctx.attention.runtime.partial import Partial
from longctx.planner import Plan, RankTransfers, Routes, TaskList, Topology, routes
from longctx.planner.tasks import ranges
from longctx.sequence import Places, Rows, TileSet
from longctx.sequence.documents import Int64
from longctx.sequence.tiles import tiles_of_rows


@dataclass(frozen=True)
class Crossing:
    """One rank's rows of queries, or of keys with their values, on their way to servers and back.

    ``rows[server]``: this rank's local rows that the server reads in its buffer. ``places``: where the rows of each
    home lie in this rank's own buffer, in order of heads group, document and position. Tensors are ``[1, rows, H/TP/G,
    ...]``.
    """

    rows: tuple[Rows, ...]
    places: Places

    def read(self, server: int, local: Tensor) -> Tensor:
        """What the server reads of a tensor of local rows."""
        return self.rows[server].take(local)

    def asked(self, server: int) -> int:
        """How many rows that is."""
        return len(self.rows[server])

    def sent(self, home: int) -> int:
        """How many rows this rank reads of a home's."""
        return self.places.counts[home]

    def buffer(self, by_home: Sequence[Tensor]) -> Tensor:
        """What came from each home, in one buffer."""
        whole = by_home[0].new_empty(1, len(self.places.positions), *by_home[0].shape[2:])
        for home, part in enumerate(by_home):
            self.places.put(home, part, whole)
        return whole

    def picked(self, home: int, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the buffer that belong to one home, in this dtype."""
        part = buffer.new_empty(1, self.sent(home), *buffer.shape[2:], dtype=dtype)
        self.places.pick(home, buffer, part)
        return part

    def merge(self, server: int, partial: Partial, results: Sequence[Tensor]) -> None:
        """Takes in what the server found, (out, lse), of local queries."""
        partial.merge_packed(self.rows[server], *results)

    def add(self, server: int, local: Tensor, share: Tensor) -> None:
        """Adds the server's share of gradients to those of local rows."""
        self.rows[server].add_to(local, share)

    @classmethod
    def of(cls, side: RankTransfers, length: int) -> Crossing:
        """``length``: local rows of one heads group."""
        sent = side.send_group * length + side.send
        place = np.empty_like(side.order)
        place[side.order] = np.arange(len(side.order))
        ends_there, ends_here = np.cumsum(side.send_counts)[:-1], np.cumsum(side.recv_counts)[:-1]
        return cls(tuple(map(_rows, np.split(sent, ends_there))), Places(np.split(place, ends_here)))


class Served:
    """What one rank sends, computes and gives back.

    ``here``: tiles over its own tokens as they lie, of queries whose keys are all its own. ``rest``: tiles over the
    buffers of ``queries`` and ``keys``.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        own = plan.rank(rank)
        self.queries, self.keys = Crossing.of(own.q, own.rows), Crossing.of(own.kv, own.rows)
        shift = own.here.group * own.rows
        self.here = _tiles(own.here, shift + own.here.q_start, shift + own.here.k_start)
        self.rest = _tiles(own.rest, own.rest.q_start, own.rest.k_start)


@dataclass(frozen=True)
class Bundle:
    """The tensors that one exchange takes from rank to rank. ``queries``, ``keys``: bytes of a row of each tensor, of
    those that go with query rows and, behind them, with rows of keys. ``home``: from servers back."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    home: bool = False


class Dispatch:
    """Who serves what of one batch, or of the batches of several groups of ranks, for one pass.

    ``topology``: where the ranks are, which decides how messages travel; None: on one node.
    """

    def __init__(self, plan: Plan, topology: Topology | None = None) -> None:
        self.world, self.plan = plan.home.ranks, plan
        self._topology = topology or Topology(self.world, per_node=self.world)
        self._served: dict[int, Served] = {}
        self._routes: dict[Bundle, Routes | None] = {}

    def served(self, rank: int) -> Served:
        """Worked out at first use."""
        if rank not in self._served:
            self._served[rank] = Served(self.plan, rank)
        return self._served[rank]

    def cells(self, rank: int) -> float:
        """Visible (query, key) pairs that a rank computes; a heads group counts as its share of the heads."""
        return int(self.plan.cost.work[rank]) / self.plan.groups

    @cached_property
    def query_rows(self) -> Int64:
        """(token, heads group) rows from rank to rank, int64 ``[W, W]``; the diagonal stays where it is."""
        return self.plan.q.matrix(self.world)

    @cached_property
    def key_rows(self) -> Int64:
        return self.plan.kv.matrix(self.world)

    def sizes(self, bundle: Bundle) -> Int64:
        """Bytes of each tensor from rank to rank, int64 ``[K, W, W]``; what stays where it is is on the diagonal."""
        sizes = [self.query_rows * width for width in bundle.queries] + [self.key_rows * width for width in bundle.keys]
        made = np.stack(sizes)
        return made.transpose(0, 2, 1) if bundle.home else made

    def routes(self, bundle: Bundle) -> Routes | None:
        """How the messages of such an exchange travel; None: directly."""
        if bundle not in self._routes:
            self._routes[bundle] = routes(self.sizes(bundle), self._topology)
        return self._routes[bundle]

    def sent(self, bundle: Bundle, rank: int) -> tuple[int, int]:
        """Bytes and messages that a rank sends in it."""
        routed = self.routes(bundle)
        if routed is not None:
            return routed.sent(rank)
        sizes = np.delete(self.sizes(bundle)[:, rank], rank, axis=1)
        return int(sizes.sum()), int(np.count_nonzero(sizes))

    def carried(self, bundle: Bundle, rank: int) -> int:
        """Bytes that a rank holds in it for others."""
        routed = self.routes(bundle)
        return 0 if routed is None else routed.carried(rank)


def _rows(places: Int64) -> Rows:
    """Ascending places as intervals."""
    edges = np.flatnonzero(np.diff(places) != 1)
    starts, stops = np.append(places[:1], places[edges + 1]), np.append(places[edges], places[-1:]) + 1
    return Rows(tuple(zip(starts.tolist(), stops.tolist(), strict=True)))


def _tiles(tasks: TaskList, q_start: Int64, k_start: Int64) -> tuple[TileSet, ...]:
    """``q_start``, ``k_start``: where the tasks' first queries and keys lie in what the tiles are over."""
    count, keys = tasks.q_stop - tasks.q_start, tasks.k_stop - tasks.k_start
    task, row = np.repeat(np.arange(len(count)), count), ranges(count * 0, count)
    first, last = np.maximum(0, row + tasks.lo[task]), np.minimum(keys[task], row + tasks.hi[task] + 1)
    tiles = tiles_of_rows(q_start[task] + row, k_start[task] + first, k_start[task] + last)
    return (TileSet(0, 1, tiles),) if tiles else ()
