"""Bytes and memory of Ulysses."""

from __future__ import annotations

from longctx.attention.costs import local
from longctx.attention.costs.all_to_all import all_to_all_sends, peak_in_rows
from longctx.attention.costs.estimate import Costs, Peak, summed
from longctx.attention.runtime.sizes import Sizes
from longctx.sequence import SequencePlan


def peak_memory(plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns the peak memory of the rank with most, in bytes: all-to-alls before and after local attention."""
    return peak_in_rows(plan, sizes, local.alive)


COSTS = Costs(summed(all_to_all_sends), peak_memory, all_to_all_sends)
