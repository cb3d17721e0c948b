"""What Ulysses sends and keeps in memory."""

from __future__ import annotations

from longctx.attention.costs import local
from longctx.attention.costs.all_to_all import peak_in_rows, swap_sends
from longctx.attention.costs.estimate import Costs, Peak, summed
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """What swaps around whole sequences take."""
    return peak_in_rows(plan, sizes, local.alive)


COSTS = Costs(summed(swap_sends), peak_memory, swap_sends)
