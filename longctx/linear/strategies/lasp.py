"""LASP passes the state itself along the chain, from each segment to the next.

Sun et al., "Linear Attention Sequence Parallelism" (2024).

    summarize my segments: (A, B)                  what each segment owes the state that entered it
    O = what chunks read of themselves             gradients of what does not wait for others
    for each of my segments, in order:             for each of my segments, from the last:
        receive S_in from the one before               receive D_out from the one behind
        send A S_in + B to the one behind              send A^T D_out + (what it owes S_in) to the one before
    O += Q S_in                                    gradients of my summaries

A message is one state; transitions stay at home. A rank computes before it waits, and what a first segment sends, it
sends before that. The chain follows positions, not ranks: under zigzag it runs to the last rank and back, under
stripes round and round. Where no document crosses an edge of segments nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.attention.costs.estimate import Volume
from longctx.comm import exchange
from longctx.linear.affine import apply_transitions
from longctx.linear.registry import LinearSizes, LinearStrategy, causal_only
from longctx.linear.segments import chain_of
from longctx.linear.states import Arriving, LinearContext, Summary, chain_subset
from longctx.sequence import SequencePlan


def enter(summary: Summary, context: LinearContext) -> Arriving:
    """Starts the forward pass along the chain, which gives S_in of this rank's segments."""
    return _walk(summary, context, +1)


def leave(summary: Summary, context: LinearContext) -> Arriving:
    """Starts the backward pass along the chain, which gives D_out of this rank's segments."""
    return _walk(summary, context, -1)


def _walk(summary: Summary, context: LinearContext, direction: int) -> Arriving:
    """Starts along the chain, as far as it goes without waiting."""
    received = torch.zeros_like(summary.states)
    steps = _steps(summary, context, direction, received)
    next(steps, None)

    def go_on() -> Tensor:
        for _ in steps:
            pass
        return received

    return go_on


def _steps(summary: Summary, context: LinearContext, direction: int, received: Tensor) -> Iterator[None]:
    """Fills ``received``, one segment after another; pauses before it waits."""
    chain, sent = context.chain, []
    subset = chain_subset(context.plan, range(len(chain)), received.device)
    for element, place in list(enumerate(context.own))[::direction]:
        # An edge of segments has the number of the place behind it.
        edge, onward = (place, place + 1)[::direction]
        state = torch.zeros_like(received[:, element])
        if chain.crossed(edge):
            receiving = exchange(context.group, [], [(chain.segments[place - direction].rank, torch.empty_like(state))])
            yield
            state = torch.where(subset.joined[:, edge], receiving.wait()[0], 0)
            received[:, element] = state
        if chain.crossed(onward):
            transition, keep = summary.transitions[:, element], subset.keep[:, place]
            if direction > 0:
                passed = apply_transitions(transition, torch.where(keep, state, 0))
            else:
                passed = torch.where(keep, apply_transitions(transition.mT, state), 0)
            passed = (passed + summary.states[:, element]).contiguous()
            sent.append(exchange(context.group, [(chain.segments[place + direction].rank, passed)], []))
    yield
    for message in sent:
        message.wait()


def volume(plan: SequencePlan, rank: int, sizes: LinearSizes) -> Volume:
    """Counts a state over each edge of this rank's segments that a document crosses.

    It goes to the segment behind in the forward pass, to the one before in the backward pass.
    """
    chain = chain_of(plan)
    behind = sum(chain.crossed(place + 1) for place in chain.places_of(rank))
    before = sum(chain.crossed(place) for place in chain.places_of(rank))
    return Volume(behind * sizes.state, before * sizes.state, behind, before)


LASP = LinearStrategy("lasp", enter, leave, "contiguous", causal_only, volume)
