"""Tasks of a batch as a planner assigns them: the bridge between where tokens are and ``longctx.planner``."""

from __future__ import annotations

import numpy as np

from longctx.planner import Home, MaskSlices, Options, Topology, Widths, causal, full, plan, window
from longctx.sequence import Homes, Mask
from longctx.sequence.documents import Int64
from longctx.sequence.homes import touched
from longctx.sequence.tasks import Task

BLOCK = 128  # rows that a cut counts by; a kernel's tile
PER_RANK = 16  # blocks that a rank has at least: short sequences are cut finer


def assigned(homes: Homes, planner: str, widths: Widths) -> tuple[Task, ...]:
    """Who serves what, on servers that are the ranks of ``homes``; the same on every rank."""
    starts = [row.cu_seqlens[:-1] for row in homes.documents]
    row_of = np.repeat(np.arange(len(starts)), [len(start) for start in starts])
    start_of = np.concatenate(starts)
    lengths = np.concatenate([row.lengths for row in homes.documents])
    options = Options(block=max(1, min(BLOCK, homes.shard // PER_RANK)), widths=widths)
    made = plan(planner, _mask(homes.mask, lengths), Topology(homes.world), options, _home(homes, lengths))
    tasks = made.tasks
    columns = (tasks.doc, tasks.q0, tasks.q1, tasks.k0, tasks.k1, tasks.server)
    return tuple(
        Task(int(row_of[doc]), first + q0, first + q1, first + k0, first + k1, server)
        for doc, q0, q1, k0, k1, server in zip(*(column.tolist() for column in columns), strict=True)
        for first in [int(start_of[doc])]
    )


def _mask(mask: Mask, lengths: Int64) -> MaskSlices:
    of = lengths.tolist()
    if mask.window is not None:
        return window(of, mask.window, two_sided=not mask.causal)
    return causal(of) if mask.causal else full(of)


def _home(homes: Homes, lengths: Int64) -> Home:
    """Where the layout has the tokens: runs of every rank, in the order of its memory."""
    (begin, end), runs = homes.bounds, homes.runs
    run, doc = touched(begin, end, runs.start, runs.stop)
    start, stop = np.maximum(runs.start[run], begin[doc]), np.minimum(runs.stop[run], end[doc])
    order = np.argsort(runs.rank[run], kind="stable")  # a rank's numbers ascend with its memory
    columns = (runs.rank[run], doc, start - begin[doc], stop - begin[doc])
    return Home(lengths, homes.world, [column[order] for column in columns])
