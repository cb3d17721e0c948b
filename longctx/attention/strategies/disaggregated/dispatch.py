"""What a planner's plan means to its executor: rows of tensors, indices in buffers, and tiles.

Three types say which rows go where. ``planner.DocumentPlacement``: on which local rows of which rank each token lives.
Local rows are those of its tensors of all batch rows, ``[B * T/SP]``, of G heads groups one after another.
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
    """Moves one rank's rows of queries, or of keys with their values, to servers and back.

    ``rows[server]``: this rank's local rows that the server reads in its buffer. ``places``: where the rows of each
    owner lie in this rank's own buffer, in order of heads group, document and position. Tensors are ``[1, rows, H/TP/G,
    ...]``.
    """

    rows: tuple[Rows, ...]
    places: Places

    def read(self, server: int, local: Tensor) -> Tensor:
        """Returns the rows of a local tensor that a server reads."""
        return self.rows[server].take(local)

    def asked(self, server: int) -> int:
        """Returns how many local rows a server reads."""
        return len(self.rows[server])

    def sent(self, owner: int) -> int:
        """Returns how many rows of another rank this rank reads."""
        return self.places.counts[owner]

    def buffer(self, by_owner: Sequence[Tensor]) -> Tensor:
        """Returns one buffer of the rows that came from each owner."""
        whole = by_owner[0].new_empty(1, len(self.places.positions), *by_owner[0].shape[2:])
        for owner, part in enumerate(by_owner):
            self.places.put(owner, part, whole)
        return whole

    def picked(self, owner: int, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the rows of the buffer that belong to one owner, in this dtype."""
        part = buffer.new_empty(1, self.sent(owner), *buffer.shape[2:], dtype=dtype)
        self.places.pick(owner, buffer, part)
        return part

    def merge(self, server: int, partial: Partial, results: Sequence[Tensor]) -> None:
        """Merges a server's results (out, lse) into those of local queries."""
        partial.merge_packed(self.rows[server], *results)

    def add(self, server: int, local: Tensor, share: Tensor) -> None:
        """Adds a server's share of gradients to those of local rows."""
        self.rows[server].add_to(local, share)

    @classmethod
    def of(cls, side: RankTransfers, length: int) -> Crossing:
        """Makes the copies that one rank's transfers say. ``length``: local rows of one heads group."""
        sent = side.send_group * length + side.send
        place = np.empty_like(side.order)
        place[side.order] = np.arange(len(side.order))
        ends_there, ends_here = np.cumsum(side.send_counts)[:-1], np.cumsum(side.recv_counts)[:-1]
        return cls(tuple(map(_rows, np.split(sent, ends_there))), Places(np.split(place, ends_here)))


class Served:
    """Holds what one rank sends, computes and returns.

    ``local``: tiles over its own tokens as they lie, of queries whose keys are all its own. ``remote``: tiles over the
    buffers of ``queries`` and ``keys``.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        own = plan.rank(rank)
        self.queries, self.keys = Crossing.of(own.q, own.rows), Crossing.of(own.kv, own.rows)
        shift = own.local.group * own.rows
        self.local = _tiles(own.local, shift + own.local.q_start, shift + own.local.k_start)
        self.remote = _tiles(own.remote, own.remote.q_start, own.remote.k_start)


@dataclass(frozen=True)
class Bundle:
    """Describes the tensors that one exchange carries between ranks.

    ``queries``, ``keys``: bytes of a row of each tensor, of those that go with query rows and, behind them, with rows
    of keys. ``returns``: from servers back to the rows' owners.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    returns: bool = False


class Dispatch:
    """Says who computes what for whom in one pass, of one batch or of the batches of several groups of ranks.

    ``topology``: where the ranks are, which decides how messages travel; None: all on one node.
    """

    def __init__(self, plan: Plan, topology: Topology | None = None) -> None:
        self.world, self.plan = plan.home.ranks, plan
        self._topology = topology or Topology(self.world, per_node=self.world)
        self._served: dict[int, Served] = {}
        self._routes: dict[Bundle, Routes | None] = {}

    def served(self, rank: int) -> Served:
        """Returns what one rank sends and computes, made at first use."""
        if rank not in self._served:
            self._served[rank] = Served(self.plan, rank)
        return self._served[rank]

    def cells(self, rank: int) -> float:
        """Returns how many visible (query, key) pairs a rank computes.

        A heads group counts as its share of the heads.
        """
        return int(self.plan.cost.work[rank]) / self.plan.groups

    @cached_property
    def query_rows(self) -> Int64:
        """Returns how many (token, heads group) rows go from rank to rank, int64 ``[W, W]``.

        Those on the diagonal stay where they are.
        """
        return self.plan.q.matrix(self.world)

    @cached_property
    def key_rows(self) -> Int64:
        return self.plan.kv.matrix(self.world)

    def sizes(self, bundle: Bundle) -> Int64:
        """Returns the bytes of each tensor from rank to rank, int64 ``[K, W, W]``.

        Those on the diagonal stay where they are.
        """
        sizes = [self.query_rows * width for width in bundle.queries] + [self.key_rows * width for width in bundle.keys]
        made = np.stack(sizes)
        return made.transpose(0, 2, 1) if bundle.returns else made

    def routes(self, bundle: Bundle) -> Routes | None:
        """Returns how the messages of an exchange travel; None: directly."""
        if bundle not in self._routes:
            self._routes[bundle] = routes(self.sizes(bundle), self._topology)
        return self._routes[bundle]

    def sent(self, bundle: Bundle, rank: int) -> tuple[int, int]:
        """Returns the bytes and messages that a rank sends in an exchange."""
        routed = self.routes(bundle)
        if routed is not None:
            return routed.sent(rank)
        sizes = np.delete(self.sizes(bundle)[:, rank], rank, axis=1)
        return int(sizes.sum()), int(np.count_nonzero(sizes))

    def carried(self, bundle: Bundle, rank: int) -> int:
        """Returns the bytes that a rank holds for others in an exchange."""
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
    first, last = k_start[task] + first, k_start[task] + last
    # Tasks that share no keys may be of two documents; those that do are of one.
    apart = (np.diff(task) != 0) & (first[1:] >= last[:-1])
    document = np.concatenate([[0], np.cumsum(apart)])[: len(task)]
    tiles = tiles_of_rows(q_start[task] + row, first, last, document)
    return (TileSet(0, 1, tiles),) if tiles else ()
