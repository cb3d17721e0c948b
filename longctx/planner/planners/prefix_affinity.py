"""Prefers servers that have read a prefix already: short ends of documents go where the rows before them live.

A rank may hold the last rows of a document and little before them. It then reads all that lies between for a few
queries. The rank that holds the rows before has read that prefix for its own rows. If the queries go there, only they
are sent.
"""

from __future__ import annotations

import numpy as np

from longctx.planner.cost import AttentionShape
from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.slices import Int64

LIGHT = 0.05  # of a server's cells


def with_prefix_affinity(
    home: DocumentPlacement, widths: AttentionShape, spare: Int64, limit: int
) -> DocumentPlacement:
    """Returns a placement of the same tokens in which short ends of documents live where the rows before them do.

    A span moves where that sends fewer bytes under a causal mask. ``limit``: cells that a server may compute. Only
    spans that are a small part of it move, for heavy ones have to be placed elsewhere anyway. No rank sends more than
    its ``spare`` rows for it, ``[W]``: of one that would, all stay.

    q rows that a rank has last of a document cost ``g q`` in Q and O, and their own keys. Against that stand the keys
    between them and the rank's rows before.
    """
    rank, ratio = home.rank[home.by_position], 2 * widths.row / widths.kv
    _, doc, start, stop, *_ = home.table
    before, last = _of_same_rank(doc * home.ranks + rank, stop)
    rows = stop - start
    light = rows * (start + stop + 1) // 2 <= LIGHT * limit
    moved = last & light & (start - before > (ratio + 1) * rows)
    moved[1:] &= (doc[1:] == doc[:-1]) & (rank[1:] != rank[:-1])
    moved[:1] = False
    sent = np.bincount(rank[moved], weights=rows[moved], minlength=home.ranks)
    moved &= (sent <= spare)[rank]
    if not moved.any():
        return home
    # An end behind an end goes where that one went.
    target = rank[np.maximum.accumulate(np.where(moved, 0, np.arange(len(rank))))]
    order = np.lexsort((start, doc, target))
    return DocumentPlacement(home.lengths, home.ranks, [column[order] for column in (target, doc, start, stop)])


def _of_same_rank(key: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """Returns, of spans in order of position, where the one before with the same key stops, and which is the last.

    It is 0 where there is none before.
    """
    order = np.argsort(key, kind="stable")
    same = key[order][1:] == key[order][:-1]
    before, last = np.zeros_like(stop), np.ones(len(stop), dtype=bool)
    before[order[1:]] = np.where(same, stop[order][:-1], 0)
    last[order[:-1]] = ~same
    return before, last
