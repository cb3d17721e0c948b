"""Per-document context parallelism (Llama 3, 2024; WLB-LLM, 2025) spreads every document over all ranks, in zigzag.

Causal work is equal for every document by itself, at the price of short rows. A document of L tokens gives each rank
two chunks of ``L / 2P`` rows. Documents are never padded; leftovers are dealt round-robin.
"""

from __future__ import annotations

from longctx.planner.cost import Topology
from longctx.planner.document_placement import DocumentPlacement, zigzag
from longctx.planner.options import PlannerOptions
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import TaskRuns


def per_document_zigzag(
    home: DocumentPlacement, mask: MaskSlices, topology: Topology, options: PlannerOptions
) -> TaskRuns:
    """Computes rows where a zigzag layout of each document has them. Reads no option.

    Queries move only where ``home`` is another layout than ``home.zigzag``.
    """
    return TaskRuns.between(home, zigzag(home.lengths, home.ranks))
