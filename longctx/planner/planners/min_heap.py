"""MagiAttention's static dispatch (2025) deals equal chunks of query rows, heaviest first, to the least loaded server.

Every server takes at most ``ceil(chunks / servers)`` of them, so that rows are balanced as well as cells.
"""

from __future__ import annotations

import heapq

import numpy as np

from longctx.planner.cost import Topology
from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.options import PlannerOptions
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import TaskRuns, ranges


def min_heap(home: DocumentPlacement, mask: MaskSlices, topology: Topology, options: PlannerOptions) -> TaskRuns:
    """Deals chunks of rows to the least loaded server. Reads ``chunk``.

    A chunk lies within one span of its home, so short spans give short chunks.
    """
    count = -(-(home.stop - home.start) // options.chunk)
    span = np.repeat(np.arange(len(home.doc)), count)
    start = home.start[span] + ranges(count * 0, count) * options.chunk
    stop = np.minimum(start + options.chunk, home.stop[span])
    area = mask.area(home.doc[span], start, stop)
    limit = -(-len(span) // home.ranks)
    servers = [(0, rank, 0) for rank in range(home.ranks)]
    chosen = np.zeros(len(span), dtype=np.int64)
    for chunk in np.argsort(-area, kind="stable").tolist():
        load, rank, assigned = heapq.heappop(servers)
        chosen[chunk] = rank
        if assigned + 1 < limit:
            heapq.heappush(servers, (load + int(area[chunk]), rank, assigned + 1))
    return TaskRuns.of_rows(home.doc[span], start, stop, home.rank[span], chosen)
