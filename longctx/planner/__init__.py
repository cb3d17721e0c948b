"""Plans which rank computes which attention cells, and what must be sent for it: plain integers, free of torch.

``plan(planner, mask, topology, options, home) -> Plan`` is the interface; ``docs/planner.md`` tells the idea.
"""

from longctx.planner.cost import AttentionShape, CostReport, Topology
from longctx.planner.document_placement import DocumentPlacement, contiguous, streamed, zigzag
from longctx.planner.legality import check
from longctx.planner.options import PlannerOptions
from longctx.planner.plan import Plan
from longctx.planner.planning import PLANNERS, make_plan, plan
from longctx.planner.rank_plan import RankPlan, RankTransfers, TaskList
from longctx.planner.routing import Routes, routes
from longctx.planner.slices import MaskSlices, Slice, Span, causal, full, prefix_lm, shared_prefix, window
from longctx.planner.tasks import TaskRuns, Tasks
from longctx.planner.transfers import Transfers

__all__ = [
    "PLANNERS",
    "AttentionShape",
    "CostReport",
    "DocumentPlacement",
    "MaskSlices",
    "Plan",
    "PlannerOptions",
    "RankPlan",
    "RankTransfers",
    "Routes",
    "Slice",
    "Span",
    "TaskList",
    "TaskRuns",
    "Tasks",
    "Topology",
    "Transfers",
    "causal",
    "check",
    "contiguous",
    "full",
    "make_plan",
    "plan",
    "prefix_lm",
    "routes",
    "shared_prefix",
    "streamed",
    "window",
    "zigzag",
]
