"""Plans as DistCA's released greedy does, written anew from its description, for ``python -m benchmarks planning``.

Ranks with a deficit take items of overloaded ranks, largest deficit first, until their need is below ``tolerance`` of
the mean. They take the item with the fewest bytes per work. An item is a band of a document's head rows and the
mirrored band of tail rows: such a pair of rows costs ``length + 1`` cells. Bytes are estimated by the whole document's
KV, known or not. The description leaves open which pairs of an item go; here it is the inner ones, whose prefix is
shorter.
"""

from __future__ import annotations

import numpy as np

from longctx.planner import AttentionShape, DocumentPlacement, TaskRuns
from longctx.planner.tasks import ranges


def distca(home: DocumentPlacement, tolerance: float = 0.1, widths: AttentionShape | None = None) -> TaskRuns:
    """Shares out runs of causal documents whose home is ``document_placement.streamed``: head pieces, mirrored tail."""
    widths = widths or AttentionShape()
    items = _items(home)
    length, pairs, owner = items[:, 1], items[:, 3] - items[:, 2], items[:, 4]
    load = np.bincount(owner, weights=pairs * (length + 1), minlength=home.ranks).astype(np.int64)
    mean = load.sum() / home.ranks
    donors = np.flatnonzero(load > mean)
    # Columns: doc, length, first and last head row of the band, home; items move whole or lose pairs.
    alive = items[np.isin(owner, donors)].copy()
    moved: list[tuple[int, int, int, int, int, int]] = []
    q_width, kv_width = widths.row / widths.element, widths.kv / widths.element
    for rank in np.argsort(load - mean, kind="stable").tolist():
        need = mean - load[rank]
        while need > tolerance * mean and len(alive):
            cost = alive[:, 1] + 1
            surplus = load[alive[:, 4]] - mean
            cells = np.minimum(np.minimum(need, (alive[:, 3] - alive[:, 2]) * cost), surplus)
            usable = cells > 0
            if not usable.any():
                break
            volume = q_width * cells / cost + kv_width * cost
            best = int(np.argmin(np.where(usable, volume / np.maximum(cells, 1), np.inf)))
            doc, size, _, last, source = alive[best].tolist()
            count = int(cells[best] // (size + 1))
            if count == 0:
                break
            moved.append((doc, size, last - count, last, source, rank))
            load[source] -= count * (size + 1)
            load[rank] += count * (size + 1)
            need -= count * (size + 1)
            alive[best, 3] -= count
            if alive[best, 2] == alive[best, 3]:
                alive = np.delete(alive, best, axis=0)
    stay = [(*row, row[4]) for row in (alive[np.argsort(alive[:, 0], kind="stable")]).tolist()]
    stay += [(*row, row[4]) for row in items[~np.isin(owner, donors)].tolist()]
    return _runs(moved + stay, home)


def _items(home: DocumentPlacement) -> np.ndarray:
    """Lists (doc, length, first head row, last head row, rank); an odd middle row is a head row without a partner."""
    rows = []
    for rank, doc, start, stop in zip(home.rank, home.doc, home.start, home.stop, strict=True):
        length = int(home.lengths[doc])
        middle = (length + 1) // 2
        if start < middle:
            rows.append((doc, length, start, min(stop, middle), rank))
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def _runs(items: list[tuple[int, int, int, int, int, int]], home: DocumentPlacement) -> TaskRuns:
    """Returns both bands of every item, cut where mirrored rows live elsewhere.

    Home pieces are a row off after odd budgets.
    """
    rows = []
    for number, length, first, last, _, to in items:
        rows.append((number, first, last, to))
        low, high = max(last, length - last), length - first
        if low < high:
            rows.append((number, low, high, to))
    doc, start, stop, server = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    key, _, lives_from, lives_to, rank, _ = home.table
    at = np.searchsorted(key, doc * home.stride + start, "right") - 1
    count = np.searchsorted(key, doc * home.stride + stop) - at
    run, span = np.repeat(np.arange(len(doc)), count), ranges(at, count)
    begin, end = np.maximum(start[run], lives_from[span]), np.minimum(stop[run], lives_to[span])
    return TaskRuns.of_rows(doc[run], begin, end, rank[span], server[run])
