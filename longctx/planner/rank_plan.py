"""One rank's side of a plan: what it sends, receives and computes, as indices, counts and tasks over its buffers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.slices import Int64
from longctx.planner.tasks import Tasks, ranges
from longctx.planner.transfers import Transfers


@dataclass(frozen=True, eq=False)
class RankTransfers:
    """Describes one rank's side of moving rows to servers: Q with its O on the way back, or K and V.

    ``send``: int64 ``[n]``, local rows to send, in order of destination; ``send_group``: their heads groups.
    ``send_counts``, ``recv_counts``: int64 ``[W]``, the split lists; a rank's own rows among them are those that it
    reads in its buffer. ``order``: int64 ``[m]``; received rows taken in this order lie by heads group, document and
    position.
    """

    send: Int64
    send_group: Int64
    send_counts: Int64
    recv_counts: Int64
    order: Int64


@dataclass(frozen=True, eq=False)
class TaskList:
    """Lists tasks: queries ``[q_start, q_stop)`` of one buffer against keys ``[k_start, k_stop)`` of another.

    Cell (i, j) counted from their starts is visible where ``lo <= j - i <= hi``. Every query sees a key, and the first
    and the last key are seen. Columns int64 ``[N]``.
    """

    group: Int64
    q_start: Int64
    q_stop: Int64
    k_start: Int64
    k_stop: Int64
    lo: Int64
    hi: Int64

    @classmethod
    def of(cls, tasks: Tasks, q_start: Int64, k_start: Int64) -> TaskList:
        """Lists tasks over buffers, in which their first queries and keys lie at ``q_start`` and ``k_start``."""
        shift = tasks.q0 - tasks.k0
        q_stop, k_stop = q_start + tasks.q1 - tasks.q0, k_start + tasks.k1 - tasks.k0
        return cls(tasks.group, q_start, q_stop, k_start, k_stop, tasks.lo + shift, tasks.hi + shift)


@dataclass(frozen=True, eq=False)
class RankPlan:
    """Holds what one rank's executor needs; it sends its own rows and computes as a server.

    ``local``: tasks over the rank's ``rows`` local ones as they lie, whose queries and keys are all its own; they
    need nothing of others. ``remote``: tasks over two buffers, of the rows of ``q`` and of ``kv``.

    Forward: send Q and KV rows by ``q`` and ``kv``, compute ``local``, put the received rows in ``order``, compute
    ``remote``. Partials of one row are merged on the server in order of the tasks and return by the transposed counts
    (undo ``order``). Their home merges what it gets of one row, its own first, in order of the servers. Row j of the
    returned buffer belongs to local row ``q.send[j]``, heads group ``q.send_group[j]``.
    """

    rows: int
    q: RankTransfers
    kv: RankTransfers
    local: TaskList
    remote: TaskList

    @classmethod
    def of(cls, home: DocumentPlacement, tasks: Tasks, q: Transfers, kv: Transfers, rank: int) -> RankPlan:
        """Makes one rank's plan from the tasks and transfers of all ranks."""
        mine = _by_residence(tasks.part(np.flatnonzero(tasks.server == rank)), home)
        mine = mine.part(np.lexsort((mine.k0, mine.q0, mine.doc, mine.group)))
        resident = _resident(mine, home)
        local, remote = mine.part(np.flatnonzero(resident)), mine.part(np.flatnonzero(~resident))
        there = (remote.server, remote.group, remote.doc)
        own_q, own_kv = (
            Transfers.of(home, *there, remote.q0, remote.q1),
            Transfers.of(home, *there, remote.k0, remote.k1),
        )
        side_q, q_start = _exchange(home, q, own_q, rank, remote, remote.q0)
        side_kv, k_start = _exchange(home, kv, own_kv, rank, remote, remote.k0)
        return cls(
            int(home.rows[rank]),
            side_q,
            side_kv,
            TaskList.of(local, home.place(local.doc, local.q0), home.place(local.doc, local.k0)),
            TaskList.of(remote, q_start, k_start),
        )


def _by_residence(tasks: Tasks, home: DocumentPlacement) -> Tasks:
    """Cuts tasks so that all rows of one task have their keys on the same spans of their homes; the cells stay."""
    tasks = _cut(tasks, home, np.maximum(tasks.q0, tasks.k0 - tasks.lo), tasks.q1, tasks.lo)
    return _cut(tasks, home, tasks.q0, np.minimum(tasks.q1, tasks.k1 - tasks.hi), tasks.hi)


def _cut(tasks: Tasks, home: DocumentPlacement, first: Int64, last: Int64, ahead: Int64) -> Tasks:
    """Cut at those of the rows ``[first, last)`` from which the key ``ahead`` of them begins a span of its home."""
    edges, base = home.table[0], tasks.doc * home.stride + ahead
    begin = np.searchsorted(edges, base + first, "right")
    count = np.maximum(np.searchsorted(edges, base + last) - begin, 0)
    of = np.repeat(np.arange(len(tasks)), count + 1)
    opens = np.cumsum(count + 1) - (count + 1)
    inner = np.ones(len(of), dtype=bool)
    inner[opens] = False
    parts = tasks.part(of)
    parts.q0[inner] = edges[ranges(begin, count)] - base[of[inner]]
    parts.q1[:] = np.append(parts.q0[1:], 0)
    parts.q1[opens + count] = tasks.q1
    return parts.trimmed()


def _resident(tasks: Tasks, home: DocumentPlacement) -> NDArray[np.bool_]:
    """Whether the server holds all that a task reads; its keys side by side, on one span."""
    rank, of_first = home.table[4], home.span(tasks.doc, tasks.k0)
    one = of_first == home.span(tasks.doc, tasks.k1 - 1)
    return np.asarray((tasks.home == tasks.server) & one & (rank[of_first] == tasks.server))


def _exchange(
    home: DocumentPlacement, moves: Transfers, own: Transfers, rank: int, tasks: Tasks, first: Int64
) -> tuple[RankTransfers, Int64]:
    """The rank's side, and where each task's ``first`` position lies in the ordered buffer.

    ``moves``: of all ranks, whose diagonal has what tasks read where it is; ``own``: what ``tasks`` read in the buffer.
    """
    own = own.part(np.flatnonzero(own.source == rank))
    low, high = np.searchsorted(moves.source, [rank, rank + 1])
    leaving = low + np.flatnonzero(moves.dest[low:high] != rank)
    coming = np.flatnonzero((moves.dest == rank) & (moves.source != rank))
    sent, got = moves.part(leaving).joined(own), moves.part(coming).joined(own)
    sent = sent.part(np.argsort(sent.dest, kind="stable"))
    got = got.part(np.argsort(got.source, kind="stable"))
    stride, docs = home.stride, len(home.lengths)
    key = (got.group * docs + got.doc) * stride + got.start
    by_position = np.argsort(key)
    arrived = np.cumsum(got.rows) - got.rows
    order = ranges(arrived[by_position], got.rows[by_position])
    placed = np.cumsum(got.rows[by_position]) - got.rows[by_position]
    wanted = (tasks.group * docs + tasks.doc) * stride + first
    at = np.searchsorted(key[by_position], wanted, "right") - 1
    to, of = (
        np.bincount(ends, weights=part.rows, minlength=home.ranks).astype(np.int64)
        for ends, part in ((sent.dest, sent), (got.source, got))
    )
    send, send_group = ranges(sent.offset, sent.rows), np.repeat(sent.group, sent.rows)
    return RankTransfers(send, send_group, to, of, order), placed[at] + wanted - key[by_position][at]
