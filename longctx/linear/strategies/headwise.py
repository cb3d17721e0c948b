"""Headwise scan exchanges segments for heads, scans each head's whole chain on one rank, and sends states back.

    summarize my segments: (A, B)                  what each segment owes the state that entered it
    send each rank its share of the heads          send each rank its share of the heads
    O = what chunks read of themselves             gradients of what does not wait for others
    scan the whole chain for my heads              scan the whole chain back for my heads
    send S_in to the segments' owners              send D_out to the segments' owners
    O += Q S_in                                    gradients of my summaries

A rank sends about one summary and one state, for any number of ranks. A gather sends one to each, so this is for large
worlds. The B·H states need not divide by the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.attention.costs.estimate import Volume
from longctx.comm import Group, exchange
from longctx.linear.affine import Resets, affine_exscan, affine_exscan_adjoint
from longctx.linear.registry import LinearSizes, LinearStrategy, causal_only
from longctx.linear.segments import Chain, chain_of
from longctx.linear.states import (
    Arriving,
    ChainSubset,
    LinearContext,
    Summary,
    chain_subset,
    pack_segments,
    rows_of,
    segment_width,
    unpack_segments,
)
from longctx.sequence import SequencePlan

Places = Callable[[Chain, int], list[int]]  # which segments of a rank take part


def sending_segments(chain: Chain, rank: int) -> list[int]:
    """Returns the rank's segments whose state passes into the next one."""
    return [place for place in chain.places_of(rank) if chain.crossed(place + 1)]


def receiving_segments(chain: Chain, rank: int) -> list[int]:
    """Returns the rank's segments that a state enters."""
    return [place for place in chain.places_of(rank) if chain.crossed(place)]


def enter(summary: Summary, context: LinearContext) -> Arriving:
    """Starts the forward exchange, which gives S_in of this rank's segments."""
    arriving = scatter_to_heads(summary, sending_segments, context)

    def scan() -> Tensor:
        whole, subset = arriving(), _whole_chain(summary, context)
        onward, resets = _by_state(subset.onward, summary, context), _resets(subset.resets, summary, context)
        transitions, states = (torch.where(onward, one, 0) for one in (whole.transitions, whole.states))
        entering, _ = affine_exscan(transitions, states, resets=resets)
        return return_to_owners(entering, summary, receiving_segments, context)

    return scan


def leave(summary: Summary, context: LinearContext) -> Arriving:
    """Starts the backward exchange, which gives D_out of this rank's segments."""
    arriving = scatter_to_heads(summary, receiving_segments, context)

    def scan() -> Tensor:
        whole, subset = arriving(), _whole_chain(summary, context)
        joined, resets = _by_state(subset.joined, summary, context), _resets(subset.resets_back, summary, context)
        transitions, gradients = (torch.where(joined, one, 0) for one in (whole.transitions, whole.states))
        leaving, _ = affine_exscan_adjoint(transitions, gradients, resets=resets)
        return return_to_owners(leaving, summary, sending_segments, context)

    return scan


def state_slice(states: int, rank: int, world: int) -> slice:
    """Returns which of the B·H states a rank scans."""
    return slice(rank * states // world, (rank + 1) * states // world)


def scatter_to_heads(summary: Summary, sent: Places, context: LinearContext) -> Callable[[], Summary]:
    """Sends each rank its share of the ``sent`` segments; awaited, it gives the whole chain of this rank's share.

    Those states are ``[1, G, states, ...]``, 0 where a segment does not take part.
    """
    chain, me, ranks = context.chain, context.group.rank, range(context.group.size)
    batch, heads = summary.states.shape[0], summary.states.shape[2]
    mine = pack_segments(summary, [context.own.index(place) for place in sent(chain, me)], context).flatten(1, 2)
    receiving = [sent(chain, rank) for rank in ranks]
    own, numbers = state_slice(batch * heads, me, context.group.size), segment_width(summary, context)
    posted = _swap(
        context.group,
        [mine[:, state_slice(batch * heads, rank, context.group.size)] for rank in ranks],
        [mine.new_empty(len(places), own.stop - own.start, numbers) for places in receiving],
    )

    def arrive() -> Summary:
        chained = mine.new_zeros(len(chain), own.stop - own.start, numbers)
        for places, part in zip(receiving, posted(), strict=True):
            rows_of(places).put(chained, part, 0)
        whole = unpack_segments(chained.unsqueeze(1), summary, context)
        if context.decay is None:
            return whole
        known = _whole_chain(summary, context).known(context.decay)
        return Summary(_by_state(known, summary, context), whole.states)

    return arrive


def return_to_owners(states: Tensor, summary: Summary, received: Places, context: LinearContext) -> Tensor:
    """Sends scanned states ``[1, G, states, K, V]`` back and returns those of this rank's segments ``[B, n, H, K, V]``.

    States that are not ``received`` are 0.
    """
    chain, me, ranks = context.chain, context.group.rank, range(context.group.size)
    like = torch.zeros_like(summary.states)
    count, places = like.shape[0] * like.shape[2], received(chain, me)
    shares = [state_slice(count, rank, context.group.size) for rank in ranks]
    arrived = _swap(
        context.group,
        [rows_of(received(chain, rank)).take(states[0], 0) for rank in ranks],
        [states.new_empty(len(places), own.stop - own.start, *states.shape[3:]) for own in shares],
    )()
    if places:
        found = torch.cat(arrived, 1).unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)
        rows_of([context.own.index(place) for place in places]).put(like, found)
    return like


def _swap(group: Group, parts: Sequence[Tensor], buffers: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Exchanges all to all: ``parts[r]`` goes to rank r; awaited, it gives what each rank sent, own part included."""
    others = group.others
    posted = exchange(
        group,
        [(rank, parts[rank].contiguous()) for rank in others],
        [(rank, buffers[rank]) for rank in others],
    )

    def arrive() -> list[Tensor]:
        arrived = posted.wait()
        arrived.insert(group.rank, parts[group.rank])
        return arrived

    return arrive


def _whole_chain(summary: Summary, context: LinearContext) -> ChainSubset:
    return chain_subset(context.plan, range(len(context.chain)), summary.states.device)


def _resets(resets: Resets | None, summary: Summary, context: LinearContext) -> Resets | None:
    """Those of this rank's share of the B·H states."""
    return None if resets is None else Resets(_by_state(resets.mask, summary, context), resets.at)


def _by_state(by_segment: Tensor, summary: Summary, context: LinearContext) -> Tensor:
    """Returns ``[B, G, 1 or H, 1, 1]`` as ``[1, G, states, 1, 1]``: this rank's share of the B·H states."""
    batch, heads = summary.states.shape[0], summary.states.shape[2]
    spread = by_segment.expand(batch, -1, heads, 1, 1).transpose(0, 1).flatten(1, 2)
    return spread[:, state_slice(batch * heads, context.group.rank, context.group.size)].unsqueeze(0)


def volume(plan: SequencePlan, rank: int, sizes: LinearSizes) -> Volume:
    """Counts a rank's summaries to the ranks that scan them, and the scanned states to the segments' owners.

    Both directions are counted in each pass.
    """
    chain, states = chain_of(plan), sizes.batch * sizes.heads
    others = [other for other in range(plan.world) if other != rank]
    shares = [state_slice(states, other, plan.world) for other in range(plan.world)]
    counts = [own.stop - own.start for own in shares]

    def passed(there: Places, back: Places) -> tuple[int, int]:
        sent = [len(there(chain, rank)) * counts[other] for other in others]
        returned = [len(back(chain, other)) * counts[rank] for other in others]
        size = sum(sent) * sizes.summary // states + sum(returned) * sizes.state // states
        return size, sum(map(bool, sent)) + sum(map(bool, returned))

    (forward, messages), (backward, messages_back) = (
        passed(sending_segments, receiving_segments),
        passed(receiving_segments, sending_segments),
    )
    return Volume(forward, backward, messages, messages_back)


HEADWISE = LinearStrategy("headwise", enter, leave, "contiguous", causal_only, volume)
