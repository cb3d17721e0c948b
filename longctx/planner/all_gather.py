"""All-gather context parallelism (Llama 3, 2024): every rank gets all keys and values and computes its own queries.

The gather does not ask who reads what: ``Plan`` counts every key to every other rank.
"""

from __future__ import annotations

from longctx.planner.cost import Topology
from longctx.planner.home import Home
from longctx.planner.options import Options
from longctx.planner.slices import MaskSlices
from longctx.planner.tasks import Runs


def all_gather(home: Home, mask: MaskSlices, topology: Topology, options: Options) -> Runs:
    """Reads no option."""
    return Runs.at_home(home)
