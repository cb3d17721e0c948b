"""Partitions of a batch's attention by hand and at random, as plans."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from longctx.attention.strategies.disaggregated.assignment import home_of, mask_of
from longctx.planner import AttentionShape, DocumentPlacement, MaskSlices, Plan, Tasks
from longctx.sequence import Documents, SequencePlan
from longctx.sequence.documents import Int64

FINEST = 2  # tokens; smaller pieces are not cut again
Piece = tuple[int, int, int, int, int, int]  # document, first and last + 1 of its rows, of its keys, server


@dataclass(frozen=True, eq=False)
class Homes:
    """Where tokens live, one by one: the definition of what ``home_of`` says in spans.

    Tokens of all batch rows are numbered row by row: row times ``length`` plus position. ``numbers[rank]``: of the
    rank's valid tokens; ``local[rank]``: their local rows.
    """

    plans: tuple[SequencePlan | None, ...]

    @classmethod
    def of(cls, *plans: SequencePlan | None) -> Homes:
        return cls(plans)

    @property
    def one(self) -> SequencePlan:
        return next(plan for plan in self.plans if plan is not None)

    @property
    def world(self) -> int:
        return len(self.plans) * self.one.world

    @property
    def documents(self) -> list[Documents]:
        return [row for plan in self.plans if plan is not None for row in plan.documents]

    @property
    def numbers(self) -> list[Int64]:
        return [numbers for numbers, _ in self._tokens()]

    @property
    def local(self) -> list[Int64]:
        return [local for _, local in self._tokens()]

    def _tokens(self) -> Iterator[tuple[Int64, Int64]]:
        first = 0
        for plan in self.plans:
            rows = np.arange(0 if plan is None else len(plan.documents))[:, None]
            for rank in range(self.one.world):
                positions = self.one.positions(rank)
                numbers = ((first + rows) * self.one.length + positions).ravel()
                yield numbers, (rows * self.one.shard + np.arange(len(positions))).ravel()
            first += len(rows)


def plan_of(homes: Homes, *pieces_of_groups: list[Piece]) -> Plan:
    """Every piece of a document's square, for each heads group; cells that are not visible are nobody's."""
    home, mask, groups = home_of(*homes.plans), mask_of(*homes.plans), len(pieces_of_groups)
    rows = [
        row
        for group, pieces in enumerate(pieces_of_groups)
        for piece in pieces
        for row in _tasks(home, mask, piece, group)
    ]
    tasks = Tasks(*np.array(rows, dtype=np.int64).reshape(-1, 10).T)
    return Plan("by hand", home, mask, tasks, AttentionShape(groups, groups, 4, 8), groups)


def _tasks(home: DocumentPlacement, mask: MaskSlices, piece: Piece, group: int) -> Iterator[tuple[int, ...]]:
    """Cut where rows pass from one home to another."""
    doc, q0, q1, k0, k1, server = piece
    for rank in range(home.ranks):
        for span in home.spans(rank):
            for one in mask.of(doc) if span.doc == doc else []:
                rows = max(one.q0, q0, span.start), min(one.q1, q1, span.stop)
                cut = replace(one, q0=rows[0], q1=max(rows), k0=max(one.k0, k0), k1=max(k0, min(one.k1, k1))).trimmed()
                if cut.area > 0:
                    yield doc, cut.q0, cut.q1, cut.k0, cut.k1, cut.lo, cut.hi, group, rank, server


def random_pieces(homes: Homes, seed: int) -> list[Piece]:
    """Every document's square cut at random, each piece with a random server."""
    chance, found = random.Random(seed), []

    def cut(doc: int, q: tuple[int, int], k: tuple[int, int]) -> None:
        sides = [side for side in (q, k) if side[1] - side[0] > FINEST]
        if not sides or chance.random() < 0.3:
            found.append((doc, *q, *k, chance.randrange(homes.world)))
            return
        side = chance.choice(sides)
        at = chance.randint(side[0] + 1, side[1] - 1)
        for part in ((side[0], at), (at, side[1])):
            cut(doc, *((part, k) if side is q else (q, part)))

    lengths = [length for row in homes.documents for length in row.lengths.tolist()]
    for doc, length in enumerate(lengths):
        cut(doc, (0, length), (0, length))
    chance.shuffle(found)
    return found


def random_plan(homes: Homes, seed: int, groups: int = 1) -> Plan:
    return plan_of(homes, *(random_pieces(homes, seed + group) for group in range(groups)))
