"""Core attention disaggregation (DistCA, 2025) ships query rows of overloaded ranks to servers with free capacity.

This one is improved. It differs from DistCA's greedy planner:
- Donors are bounded as well as receivers, so that nobody ends above ``(1 + tolerance)`` times the mean.
- A receiver is priced by the bytes that it does not hold already.
- Cuts are contiguous: a mirrored pair of bands reads the whole prefix twice over.
- Rows come in blocks, lengths are free.
- The worst rank's query egress is bounded against the least that its home layout allows.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np

from longctx.planner.cost import AttentionShape, Topology
from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.options import PlannerOptions
from longctx.planner.plan import Plan
from longctx.planner.planners.bands import ORDERS, BandSearch
from longctx.planner.planners.placement import RowRun, RunPlacement, cut_rows
from longctx.planner.planners.prefix_affinity import with_prefix_affinity
from longctx.planner.slices import Int64, MaskSlices
from longctx.planner.tasks import TaskRuns, Tasks

FEW = 64  # servers, up to which several ways are tried
FEWEST = 16  # up to which bands are cut for capacities, a search that grows with the square of the servers


def cad(home: DocumentPlacement, mask: MaskSlices, topology: Topology, options: PlannerOptions) -> TaskRuns:
    """Ships query rows of overloaded ranks. Reads ``tolerance``, ``block``, ``egress`` and ``widths``."""
    load = _load(home, mask)
    limit = int(load.sum() * (1 + options.tolerance) / home.ranks)
    if load.max(initial=0) <= limit:
        return TaskRuns.at_home(home)
    least = _least(home, mask, load, limit, _threshold(home, mask, load, limit))
    cap = int(options.egress * least.max())
    preferred = with_prefix_affinity(home, options.widths, cap - least, limit) if mask.causal else home
    # Few servers are worth several ways, of which the fewest bytes win.
    tried = _ways(preferred, home, mask, limit, cap, options, home.ranks <= FEWEST)
    if home.ranks <= FEW and preferred is not home:
        tried += _ways(home, home, mask, limit, cap, options, False)
    if len(tried) == 1:
        return tried[0]
    return min(tried, key=lambda runs: Plan("cad", home, mask, Tasks.of_runs(mask, runs), options.widths).cost.moved)


def _ways(
    preferred: DocumentPlacement,
    home: DocumentPlacement,
    mask: MaskSlices,
    limit: int,
    cap: int,
    options: PlannerOptions,
    search: bool,
) -> list[TaskRuns]:
    """Shares out the tokens of ``home`` in several ways, each starting from the ``preferred`` placement.

    ``search``: bands that are cut for capacities are among them.
    """
    load = _load(preferred, mask)
    if load.max(initial=0) <= limit:
        return [_at_homes(TaskRuns.at_home(preferred), home)]
    spare = cap - _sent(preferred, home)
    first = _threshold(preferred, mask, load, limit)
    shipped = _shipped(preferred, mask, load - limit, first, spare, options)
    left, capacity = spare.copy(), limit - load
    for run in shipped.values():
        capacity[run.home] += run.area
        left[run.home] -= run.stop - run.start
    # Sharing keys pays among many servers and may cost among few.
    ways = max(1, int(2 * options.egress - 1))
    placed = []
    for each in {ways, 1} if home.ranks <= FEW else {ways}:
        placement = RunPlacement(preferred, mask, capacity, left.tolist(), options, each)
        placed.append(placement.place(list(shipped.values())))
    if mask.causal and search:
        bands = BandSearch(preferred, load, limit, spare, options)
        found = [bands.place(order) for order in ORDERS]
        placed += [[(*one, 0, preferred.stride) for one in bands] for bands in found if bands]
    return [_at_homes(_merged(preferred, one), home) for one in placed]


def _sent(preferred: DocumentPlacement, home: DocumentPlacement) -> Int64:
    """Returns the query rows that each rank sends to bring them to their preferred placement, ``[W]``."""
    runs = _at_homes(TaskRuns.at_home(preferred), home)
    away = np.where(runs.home == runs.server, 0, runs.stop - runs.start)
    return np.bincount(runs.home, weights=away, minlength=home.ranks).astype(np.int64)


def _at_homes(runs: TaskRuns, home: DocumentPlacement) -> TaskRuns:
    """Returns the same runs with the homes that rows really have; the preferred placement moves whole spans."""
    at = np.searchsorted(home.table[0], runs.doc * home.stride + runs.start, "right") - 1
    return replace(runs, home=home.table[4][at])


def least_egress(home: DocumentPlacement, mask: MaskSlices, limit: int) -> Int64:
    """Returns the fewest query rows that each rank must send so that no server computes more than ``limit``, ``[W]``.

    ``limit``: cells. A row takes at most its own cells along, so the fewest are the longest. Rows are taken in order of
    their keys until what is left fits. It is the least of one home layout; a layout that spreads long rows over more
    ranks lowers it. Exact for masks whose rows see more keys the later they are (causal); by position, not by keys, for
    others.
    """
    load = _load(home, mask)
    if load.max(initial=0) <= limit:
        return np.zeros(home.ranks, dtype=np.int64)
    return _least(home, mask, load, limit, _threshold(home, mask, load, limit))


def _load(home: DocumentPlacement, mask: MaskSlices) -> Int64:
    area = mask.area(home.doc, home.start, home.stop)
    return np.bincount(home.rank, weights=area, minlength=home.ranks).astype(np.int64)


def _least(home: DocumentPlacement, mask: MaskSlices, load: Int64, limit: int, first: Int64) -> Int64:
    spans = np.flatnonzero((load > limit)[home.rank])
    rank, stop = home.rank[spans], home.stop[spans]
    kept = np.clip(first[rank], home.start[spans], stop)
    cells = np.bincount(rank, weights=mask.area(home.doc[spans], kept, stop), minlength=home.ranks).astype(np.int64)
    rows = np.bincount(rank, weights=stop - kept, minlength=home.ranks).astype(np.int64)
    # Several documents may have a row at the threshold; those beyond the need stay.
    beyond = np.maximum(cells - (load - limit), 0) // (first + 1)
    return np.asarray(rows - np.where(load > limit, beyond, 0))


def _threshold(home: DocumentPlacement, mask: MaskSlices, load: Int64, limit: int) -> Int64:
    """Returns the position from which on a rank's rows, of all documents, hold what it has above ``limit``, ``[W]``.

    It is the highest such position.
    """
    spans = np.flatnonzero((load > limit)[home.rank])
    rank, doc, start, stop = (column[spans] for column in (home.rank, home.doc, home.start, home.stop))
    low = np.zeros(home.ranks, dtype=np.int64)
    high = np.full(home.ranks, int(stop.max()), dtype=np.int64)
    while np.any(low < high):
        middle = (low + high + 1) // 2
        cells = mask.area(doc, np.clip(middle[rank], start, stop), stop)
        enough = np.bincount(rank, weights=cells, minlength=home.ranks) >= load - limit
        low, high = np.where(enough, middle, low), np.where(enough, high, middle - 1)
    return low


def _shipped(
    home: DocumentPlacement, mask: MaskSlices, surplus: Int64, first: Int64, spare: Int64, options: PlannerOptions
) -> dict[int, RowRun]:
    """Returns what each rank with a surplus gives away, by span.

    Fewest bytes: the longest documents first, whole or as one contiguous run. Where that sends more rows than the
    ``spare`` egress, the fewest rows instead.
    """
    donors = np.flatnonzero(surplus > 0)
    spans = np.flatnonzero((surplus > 0)[home.rank])
    # Of a donor's spans those of long documents come first, and of one document the later one.
    order = spans[np.lexsort((-home.start[spans], home.doc[spans], -mask.lengths[home.doc[spans]], home.rank[spans]))]
    columns = (order, home.doc[order], home.start[order], home.stop[order])
    donor_spans = list(zip(*(column.tolist() for column in columns), strict=True))
    ends = np.searchsorted(home.rank[order], [donors, donors + 1])
    shipped: dict[int, RowRun] = {}
    for donor, low, high in zip(donors.tolist(), ends[0].tolist(), ends[1].tolist(), strict=True):
        found = _fewest_bytes(donor, mask, donor_spans[low:high], int(surplus[donor]), options)
        if sum(run.stop - run.start for run in found.values()) > spare[donor]:
            found = _fewest_rows(donor, mask, donor_spans[low:high], int(first[donor]), options.block)
        shipped |= found
    return shipped


# (number of the span, document, start, stop)
_Span = tuple[int, int, int, int]


def _fewest_bytes(
    donor: int, mask: MaskSlices, spans: list[_Span], need: int, options: PlannerOptions
) -> dict[int, RowRun]:
    found = {}
    for number, doc, start, stop in spans:
        begin, end, area = start, stop, mask.rows_area(doc, start, stop)
        if area > need:
            if mask.causal and start == 0 and stop == mask.lengths[doc]:
                end = _best_end(need, stop, options.widths, options.block)
            begin = cut_rows(mask, (doc, start, end), need, options.block, over=True)
            area = mask.rows_area(doc, begin, end)
        found[number] = RowRun(doc, begin, end, donor, area)
        need -= area
        if need <= 0:
            break
    return found


def _fewest_rows(donor: int, mask: MaskSlices, spans: list[_Span], first: int, block: int) -> dict[int, RowRun]:
    found = {}
    for number, doc, start, stop in spans:
        if first < stop:
            begin = max(start, stop - -(-(stop - max(start, first)) // block) * block)
            found[number] = RowRun(doc, begin, stop, donor, mask.rows_area(doc, begin, stop))
    return found


def _best_end(need: int, length: int, widths: AttentionShape, block: int) -> int:
    """Returns where a run of ``need`` cells should end so that its rows and its prefix are fewest bytes together.

    q rows that end at E cost ``g q + E``, with g the bytes of Q and O over those of K and V. At a fixed area the least
    is ``q = sqrt(F / (g + 1/2))``, ``E = F / q + q / 2``, or the document's end where that lies beyond it.
    """
    ratio = 2 * widths.row / widths.kv
    rows = sqrt(need / (ratio + 0.5))
    end = int(need / rows + rows / 2) // block * block + block
    return min(length, end)


def _merged(home: DocumentPlacement, placed: list[tuple[RowRun, int, int, int]]) -> TaskRuns:
    """Returns the runs of what was placed (run, server, first key, last key), and of what spans keep."""
    rows = [(run.doc, run.start, run.stop, run.home, server, first, last) for run, server, first, last in placed]
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    table = table[np.lexsort((table[:, 1], table[:, 0]))].T
    doc, start, stop = table[:3]
    span = home.by_position[np.searchsorted(home.table[0], doc * home.stride + start, "right") - 1]
    first = np.append(True, np.diff(span) != 0)
    # Rows before each placed run, since the one before; and after the last of each span.
    before = np.where(first, home.start[span], np.append(0, stop[:-1]))
    low, high = np.append(before, stop[np.append(first[1:], True)]), np.append(start, home.stop[span[first]])
    of = np.append(span, span[first])
    gaps = np.flatnonzero(low < high)
    whole = np.ones(len(home.doc), dtype=bool)
    whole[span] = False
    stay = TaskRuns.at_home(home)
    kept = TaskRuns.of_rows(home.doc[of[gaps]], low[gaps], high[gaps], home.rank[of[gaps]], home.rank[of[gaps]])
    names = ("doc", "start", "stop", "home", "server", "first_key", "last_key")
    parts = ((getattr(stay, name)[whole], getattr(kept, name)) for name in names)
    return TaskRuns(*(np.concatenate([*both, more]) for both, more in zip(parts, table, strict=True)))
