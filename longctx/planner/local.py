"""Every rank computes the queries that live on it; keys of documents that cross a boundary come to it."""

from __future__ import annotations

from longctx.planner.cost import Topology
from longctx.planner.home import Home
from longctx.planner.options import Options
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import Runs


def local(home: Home, mask: MaskSlices, topology: Topology, options: Options) -> Runs:
    """Reads no option."""
    return Runs.at_home(home)
