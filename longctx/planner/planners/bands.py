"""Places shipped query rows on few servers: bands of rows, each cut for the capacity that it fills.

It always takes the best band next, of all pieces of all donors and for all servers, by bytes against cells. Such are
rows that fill a large capacity, or rows whose prefix their server holds already. What is left in the end fits badly,
and how badly depends on what came first. So it is done in several orders, and the caller keeps what moves the fewest
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.options import PlannerOptions
from longctx.planner.planners.placement import RowRun
from longctx.planner.slices import Int64

Float64 = NDArray[np.float64]

LOOKED_AT = 6  # pieces of a donor, longest prefix first
APART = 8  # blocks that rows above a band have at least, or they stay
MOST = 8  # bands for each server; an order that takes more is given up


@dataclass(frozen=True)
class BandOrder:
    """How bands are ranked: a band's price is ``bytes / cells ** power``.

    A power of 1/2 treats small and large ones alike, 1 prefers the large. ``row_price``: what Q and O of a row are
    taken for when the band is shaped, in multiples of their bytes. More means fewer rows with a longer prefix, hence
    less egress.
    """

    power: float
    row_price: float


# Of 25 tried on real lengths those that between them find the best plan of nearly every draw.
ORDERS = (
    BandOrder(0.85, 2),
    BandOrder(0.85, 3),
    BandOrder(0.7, 1),
    BandOrder(0.7, 1.5),
    BandOrder(0.7, 4),
    BandOrder(0.6, 1),
)


# (document, first row, last + 1) at home on a donor
Piece = tuple[int, int, int]


class BandSearch:
    """Searches for bands of rows that few servers take over from others, under causal documents.

    ``load``: cells of each rank; ``limit``: the most a server may compute; ``spare``: query rows that each rank may
    send, ``[W]``.
    """

    def __init__(self, home: DocumentPlacement, load: Int64, limit: int, spare: Int64, options: PlannerOptions) -> None:
        self._spare, self._block = spare, options.block
        self._ratio = 2 * options.widths.row / options.widths.kv
        self._limits = (limit - load).astype(np.float64)  # below 0 where there is too much
        self._spans: dict[int, list[Piece]] = {}
        for donor in np.flatnonzero(load > limit).tolist():
            self._spans[donor] = [(span.doc, span.start, span.stop) for span in home.spans(donor)]
        self._begins = {piece[:2] for spans in self._spans.values() for piece in spans}
        # Tokens of each document, from its start, that a server has: it reads what its own rows see.
        prefixes = np.zeros((home.ranks, len(home.lengths)))
        np.maximum.at(prefixes, (home.rank, home.doc), home.stop)
        self._first_prefixes = prefixes

    def place(self, order: BandOrder) -> list[tuple[RowRun, int]] | None:
        """Returns (run, server) of rows that bring all donors below the limit; None where this order finds none."""
        self._capacity, self._prefixes = self._limits.copy(), self._first_prefixes.copy()
        self._pieces = {donor: sorted(spans, key=_by_prefix) for donor, spans in self._spans.items()}
        sent = dict.fromkeys(self._pieces, 0)
        placed: list[tuple[RowRun, int]] = []
        while any(self._capacity[donor] < 0 for donor in self._pieces):
            found = self._best(order) if len(placed) < MOST * len(self._capacity) else None
            if found is None:
                return None
            placed.append(self._taken(*found))
            run = placed[-1][0]
            sent[run.home] += run.stop - run.start
            if sent[run.home] > self._spare[run.home]:
                return None
        return placed

    def _best(self, order: BandOrder) -> tuple[int, Piece, int, int, int] | None:
        """Returns (donor, piece, server, first row, last + 1) of the band with the lowest price."""
        rows = list(self._open())
        servers = np.flatnonzero(self._capacity > 0)
        if not rows or not len(servers):
            return None
        donor, doc, start, stop = (np.array(column)[:, None] for column in zip(*rows, strict=True))
        capacity, need, prefixes = (
            self._capacity[servers][None],
            -self._capacity[donor],
            self._prefixes[servers][:, doc[:, 0]].T,
        )
        end, count = self._shaped(start, stop, np.minimum(need, capacity), prefixes, need <= capacity, order.row_price)
        area = count * end - count * (count - 1) / 2
        fits = (end <= stop) & (end - count >= start) & (area <= capacity)
        cost = self._ratio * count + np.maximum(0, end - prefixes)
        price = np.where(fits, cost / np.maximum(area, 1) ** order.power, np.inf)
        at, server = np.unravel_index(int(np.argmin(price)), price.shape)
        if not fits[at, server]:
            return None
        last = int(end[at, server])
        return rows[at][0], rows[at][1:], int(servers[server]), last - int(count[at, server]), last

    def _shaped(
        self,
        start: Int64,
        stop: Int64,
        cells: Float64,
        prefixes: Float64,
        all_of_it: NDArray[np.bool_],
        row_price: float,
    ) -> tuple[Float64, Float64]:
        """Returns (end, rows) of bands of so many ``cells``.

        A band is a little smaller where the server has no capacity for more, else (``all_of_it``) a little larger. It
        has the fewest bytes in whole blocks and is moved down until the cells are met. Short pieces stay whole.

        q rows that end at E and hold F cells cost ``g q + E - prefix``, least at ``q = sqrt(F / (g + 1/2))``.
        """
        best = np.sqrt(cells / (self._ratio * row_price + 0.5))
        end = np.minimum(stop, np.maximum(cells / best + best / 2, prefixes))
        rows = end + 0.5 - np.sqrt(np.maximum(0, (end + 0.5) ** 2 - 2 * cells))
        count = np.maximum(1, np.round(rows / self._block)) * self._block
        # Towards the top a block may be too many, or too few.
        count = np.where(count * stop - count * (count - 1) / 2 < cells, count + self._block, count)
        exact = (cells + count * (count - 1) / 2) / count
        end = np.where(all_of_it, np.maximum(np.ceil(exact), start + count), np.minimum(np.floor(exact), stop))
        whole = (stop - start) * (start + stop + 1) / 2 <= cells
        return np.where(whole, stop, end), np.where(whole, stop - start, count)

    def _open(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (donor, document, first row, last + 1) of what may be cut next."""
        for donor, pieces in self._pieces.items():
            if self._capacity[donor] < 0:
                yield from ((donor, *piece) for piece in pieces[:LOOKED_AT])

    def _taken(self, donor: int, piece: Piece, server: int, first: int, last: int) -> tuple[RowRun, int]:
        doc, start, stop = piece
        run = RowRun(doc, first, last, donor, (last - first) * (first + last + 1) // 2)
        # Whole blocks, but for what begins a span.
        low = start if piece[:2] in self._begins else first - (first - start) // self._block * self._block
        above = (stop - last) // self._block
        left = [(doc, low, first)] if low < first else []
        left += [(doc, last, last + above * self._block)] if above >= APART else []
        kept = [one for one in self._pieces[donor] if one != piece]
        self._pieces[donor] = sorted(kept + left, key=_by_prefix)
        self._capacity[donor] += run.area
        self._capacity[server] -= run.area
        self._prefixes[server, doc] = max(self._prefixes[server, doc], last)
        return run, server


def _by_prefix(piece: Piece) -> int:
    return -piece[2]
