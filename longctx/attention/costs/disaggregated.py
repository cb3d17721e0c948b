"""Bytes and memory of disaggregated attention, as its dispatch says."""

from __future__ import annotations

from functools import partial

from longctx.attention.costs.estimate import Costs, Peak, Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.attention.strategies.disaggregated.execute import bundles_of, dispatches_for, of_a_row
from longctx.sequence import SequencePlan


def volume(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> Volume:
    """Returns what a rank sends: rows to servers, and results to owners.

    Each pass sends what its own dispatch says.
    """
    there, back = (volume_of(dispatch, rank, sizes) for dispatch in dispatches_for(plan, planner, sizes))
    return Volume(there.forward, back.backward, there.messages_forward, back.messages_backward)


def volume_of(dispatch: Dispatch, rank: int, sizes: Sizes) -> Volume:
    """Returns what a rank sends if ``dispatch`` is that of both passes.

    Where messages are routed, it includes what the rank passes on for others.
    """
    forward, backward = ([dispatch.sent(bundle, rank) for bundle in bundles] for bundles in bundles_of(dispatch, sizes))
    (there, messages_there), (back, messages_back) = (map(sum, zip(*sent, strict=True)) for sent in (forward, backward))
    return Volume(there, back, messages_there, messages_back)


def peak_memory(planner: str, plan: SequencePlan, sizes: Sizes) -> Peak:
    """Returns an upper bound of the peak memory of the rank with most, in bytes.

    It counts everything that a pass makes, as if nothing were freed before its end.
    """
    found = [_alive(planner, plan, rank, sizes) for rank in range(plan.world)]
    return Peak(max(forward for forward, _ in found), max(backward for _, backward in found))


def _alive(planner: str, plan: SequencePlan, rank: int, sizes: Sizes) -> tuple[int, int]:
    there, back = dispatches_for(plan, planner, sizes)
    asked, read, queries, keys, one, own = _held(there, plan, rank, sizes)
    # Sent, received, in order, computed; then what returns to owners and what comes back.
    forward = (asked + 2 * queries) * one.held(queries=1) + (read + 2 * keys) * one.held(keys=1)
    forward += (2 * queries + asked) * one.held(outputs=1, sums=1) + own * one.held(1, outputs=1, sums=1)
    asked, read, queries, keys, one, own = _held(back, plan, rank, sizes)
    backward = (asked + 2 * queries) * one.held(queries=2, sums=2) + (read + 2 * keys) * one.held(keys=1)
    backward += (2 * queries + asked) * one.held(outputs=1) + (2 * keys + read) * one.held(gradients=1)
    # Stand-ins of outputs and what they are made of; delta, and the gradients of this rank.
    backward += queries * one.held(1, outputs=3, sums=3) + own * one.held(3, outputs=3, sums=2, keys=1, gradients=1)
    # What is held for others on its way.
    forward += sum(there.carried(bundle, rank) for bundle in bundles_of(there, sizes)[0])
    backward += sum(back.carried(bundle, rank) for bundle in bundles_of(back, sizes)[1])
    return forward, backward


def _held(dispatch: Dispatch, plan: SequencePlan, rank: int, sizes: Sizes) -> tuple[int, int, int, int, Sizes, int]:
    """Rows of queries and of keys that are sent, and in the buffers; what one is, and how many the line has."""
    served, groups = dispatch.served(rank), dispatch.plan.groups
    queries, keys = (len(crossing.places.positions) for crossing in (served.queries, served.keys))
    own = plan.shard * len(plan.documents) * groups
    asked, read = (int(rows[rank].sum() - rows[rank, rank]) for rows in (dispatch.query_rows, dispatch.key_rows))
    return asked, read, queries, keys, of_a_row(sizes, dispatch), own


CAD, ZEPPELIN = (Costs(partial(volume, name), partial(peak_memory, name)) for name in ("cad", "zeppelin"))
