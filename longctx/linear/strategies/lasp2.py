"""LASP-2 gathers the segments' states once in each direction and computes while they travel.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (2025).

    summarize my segments                          what each segment owes the state that entered it
    start gathering all summaries (A, B)           start gathering them, with the A's
    O = what chunks read of themselves             gradients of what does not wait for others
    scan the chain up to my segments: S_in         scan the chain back to my segments: D_out
    O += Q S_in                                    gradients of my summaries

Unlike in the paper, a rank sends a summary only to ranks whose segments a document reaches from it. Without documents
that is half of what an all-gather sends. An early rank needs nothing of a later one in the forward pass, a late one
nothing of an earlier one in the backward pass. A state's size does not depend on the length, so neither do the bytes
of contiguous and zigzag shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.attention.costs.estimate import Volume
from longctx.comm import exchange
from longctx.linear.affine import affine_exscan, affine_exscan_adjoint
from longctx.linear.bidirectional import total_volume
from longctx.linear.mixer import get_mixer
from longctx.linear.registry import LinearCase, LinearSizes, LinearStrategy
from longctx.linear.segments import chain_of
from longctx.linear.states import (
    Arriving,
    ChainSubset,
    LinearContext,
    Summary,
    chain_subset,
    pack_segments,
    segment_width,
    unpack_segments,
)
from longctx.sequence import SequencePlan


def enter(summary: Summary, context: LinearContext) -> Arriving:
    """Sends summaries to the ranks that read them, which gives S_in of this rank's segments."""
    chain, me = context.chain, context.group.rank
    arriving = gather(summary, context, chain.sent)

    def scan() -> Tensor:
        subset, chained = arriving()
        transitions, states = (torch.where(subset.onward, one, 0) for one in (chained.transitions, chained.states))
        entering, _ = affine_exscan(transitions, states, resets=subset.resets)
        return subset.rows(chain.places_of(me)).take(entering).clone()  # or all states of the chain would be kept

    return scan


def leave(summary: Summary, context: LinearContext) -> Arriving:
    """Sends gradients of S_in to the ranks whose summaries are in it, which gives D_out of this rank's segments."""
    chain, me = context.chain, context.group.rank
    arriving = gather(summary, context, chain.returned)

    def scan() -> Tensor:
        subset, chained = arriving()
        transitions, gradients = (torch.where(subset.joined, one, 0) for one in (chained.transitions, chained.states))
        leaving, _ = affine_exscan_adjoint(transitions, gradients, resets=subset.resets_back)
        return subset.rows(chain.places_of(me)).take(leaving)

    return scan


def gather(
    summary: Summary, context: LinearContext, sent: Callable[[int, int], tuple[int, ...]]
) -> Callable[[], tuple[ChainSubset, Summary]]:
    """Starts the exchange; awaited, it gives this rank's segments with those that ``sent(sender, receiver)`` brings."""
    chain, me, others = context.chain, context.group.rank, context.group.others
    own, receiving = chain.places_of(me), {other: sent(other, me) for other in others}
    like, batch, heads = summary.states, *summary.states.shape[0:3:2]
    buffers = [like.new_empty(len(receiving[other]), batch, heads, segment_width(summary, context)) for other in others]
    posted = exchange(
        context.group,
        [(other, pack_segments(summary, [own.index(place) for place in sent(me, other)], context)) for other in others],
        list(zip(others, buffers, strict=True)),
    )

    def arrive() -> tuple[ChainSubset, Summary]:
        subset = chain_subset(
            context.plan, sorted({*own, *(p for places in receiving.values() for p in places)}), like.device
        )
        parts = [(own, summary)]
        for other, message in zip(others, posted.wait(), strict=True):
            parts.append((receiving[other], unpack_segments(message, summary, context)))
        states = _in_order(subset, [(places, part.states) for places, part in parts])
        if context.decay is not None:
            return subset, Summary(subset.known(context.decay), states)
        return subset, Summary(_in_order(subset, [(places, part.transitions) for places, part in parts]), states)

    return arrive


def _in_order(subset: ChainSubset, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Returns own and received segments, ``[B, n, ...]`` each, as one subset of the chain."""
    first = parts[0][1]
    whole = first.new_empty(first.shape[0], len(subset.places), *first.shape[2:])
    for places, part in parts:
        subset.rows(places).put(whole, part)
    return whole


def volume(plan: SequencePlan, rank: int, sizes: LinearSizes) -> Volume:
    """Counts a rank's summaries to the later ranks that read them, and in the backward pass to the earlier ones.

    There gradients take the place of additions.
    """
    if not plan.mask.causal:
        return total_volume(plan, sizes)
    chain, others = chain_of(plan), [other for other in range(plan.world) if other != rank]
    sent = [len(chain.sent(rank, other)) for other in others]
    returned = [len(chain.returned(rank, other)) for other in others]
    return Volume(
        sum(sent) * sizes.summary, sum(returned) * sizes.summary, sum(map(bool, sent)), sum(map(bool, returned))
    )


def _refuses(case: LinearCase) -> str | None:
    transition = get_mixer(case.mixer).transition
    if not case.causal and transition != "none":
        return (
            f"queries that see later tokens need a state that keeps everything, and that of mixer={case.mixer} decays; "
            "nearest valid: mixer=basic"
        )
    return None


LASP2 = LinearStrategy("lasp2", enter, leave, "contiguous", _refuses, volume)
