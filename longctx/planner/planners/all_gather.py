"""All-gather context parallelism (Llama 3, 2024) sends all keys and values to every rank, which keeps its own queries.

The gather does not ask who reads what: ``Plan`` counts every key to every other rank.
"""

from __future__ import annotations

from longctx.planner.cost import Topology
from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.options import PlannerOptions
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import TaskRuns


def all_gather(home: DocumentPlacement, mask: MaskSlices, topology: Topology, options: PlannerOptions) -> TaskRuns:
    """Computes all rows on their homes. Reads no option."""
    return TaskRuns.at_home(home)
