"""The local planner computes queries on the rank that they live on; keys that cross a boundary come to it."""

from __future__ import annotations

from longctx.planner.cost import Topology
from longctx.planner.document_placement import DocumentPlacement
from longctx.planner.options import PlannerOptions
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import TaskRuns


def local(home: DocumentPlacement, mask: MaskSlices, topology: Topology, options: PlannerOptions) -> TaskRuns:
    """Computes all rows on their homes. Reads no option."""
    return TaskRuns.at_home(home)
