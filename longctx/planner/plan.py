"""Defines a plan: which rank computes which cells of attention, and what must be sent for it, as arrays.

A task is query rows of a document against a key range, for a heads group. It has a home, where its rows live, and a
server, which computes it. Transfers follow from the tasks and the home layout alone. They are the union of what a
server reads, so that a token crosses once per (token, server). A plan belongs to no rank; ``rank`` cuts out what one
needs.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from longctx.planner.cost import AttentionShape, CostReport
from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.rank_plan import RankPlan
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import Tasks
from longctx.planner.transfers import Transfers


class Plan:
    """Tasks and transfers that a planner chose for all ranks of ``home``; every rank is a server too.

    ``name``: the planner's. ``groups``: heads groups, equal parts of the KV heads with their queries' heads. ``q``,
    ``kv``: transfers.
    """

    def __init__(
        self,
        name: str,
        home: DocumentPlacement,
        mask: MaskSlices,
        tasks: Tasks,
        widths: AttentionShape,
        groups: int = 1,
        gathered: bool = False,
    ) -> None:
        """``gathered``: every server gets all keys, read or not (all-gather context parallelism)."""
        self.name, self.home, self.mask, self.tasks = name, home, mask, tasks
        self.widths, self.groups, self.servers = widths, groups, home.ranks
        assert widths.kv_heads % groups == 0, "heads groups are equal parts of the KV heads"
        self.q = Transfers.of(home, tasks.server, tasks.group, tasks.doc, tasks.q0, tasks.q1)
        if gathered:
            assert groups == 1, "a gather has all heads"
            docs = np.tile(np.arange(len(home.lengths)), home.ranks)
            dest = np.repeat(np.arange(home.ranks), len(home.lengths))
            self.kv = Transfers.of(home, dest, docs * 0, docs, docs * 0, home.lengths[docs])
        else:
            self.kv = Transfers.of(home, tasks.server, tasks.group, tasks.doc, tasks.k0, tasks.k1)

    @cached_property
    def cost(self) -> CostReport:
        work = np.bincount(self.tasks.server, weights=self.tasks.area, minlength=self.servers).astype(np.int64)
        sides = [moves.away(self.servers) for moves in (self.q, self.kv)]
        return CostReport(work, *sides[0], *sides[1], self.groups, self.widths)

    def rank(self, rank: int) -> RankPlan:
        """Returns one rank's indices, expanded to tokens."""
        return RankPlan.of(self.home, self.tasks, self.q, self.kv, rank)
