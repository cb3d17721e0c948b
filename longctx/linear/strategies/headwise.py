"""Head-sharded scan: states swap segments for heads, are scanned where they meet, and go back.

    summarize my segments: (A, B)                  what each segment owes the state that entered it
    send each rank its share of the heads          send each rank its share of the heads
    O = what chunks read of themselves             gradients of what does not wait for others
    scan the whole chain for my heads              scan the whole chain back for my heads
    send S_in to the segments' owners              send D_out to the segments' owners
    O += Q S_in                                    gradients of my summaries

What a rank sends is about one summary and one state for any number of ranks, where a gather sends one to each: for
large worlds. The B·H states need not divide by the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.attention.costs.estimate import Volume
from longctx.comm import Group, exchange
from longctx.linear.affine import affine_exscan, affine_exscan_adjoint
from longctx.linear.registry import LinearSizes, LinearStrategy, causal_only
from longctx.linear.segments import Chain, chain_of
from longctx.linear.states import (
    Arriving,
    LinearContext,
    Stretch,
    Summary,
    packed,
    rows_of,
    stretch_of,
    unpacked,
    width,
)
from longctx.sequence import SequencePlan

Places = Callable[[Chain, int], list[int]]  # which segments of a rank take part


def feeding(chain: Chain, rank: int) -> list[int]:
    """Segments whose state passes into the next one."""
    return [place for place in chain.own(rank) if chain.crossed(place + 1)]


def fed(chain: Chain, rank: int) -> list[int]:
    """Segments that a state enters."""
    return [place for place in chain.own(rank) if chain.crossed(place)]


def enter(summary: Summary, call: LinearContext) -> Arriving:
    """S_in of this rank's segments."""
    arriving = to_heads(summary, feeding, call)

    def scan() -> Tensor:
        whole, onward = arriving(), _by_state(_stretch(summary, call).onward, summary, call)
        entering, _ = affine_exscan(onward * whole.transitions, onward * whole.states)
        return to_owners(entering, summary, fed, call)

    return scan


def leave(summary: Summary, call: LinearContext) -> Arriving:
    """D_out of this rank's segments."""
    arriving = to_heads(summary, fed, call)

    def scan() -> Tensor:
        whole, joined = arriving(), _by_state(_stretch(summary, call).joined, summary, call)
        gradients = joined * whole.states
        leaving, _ = affine_exscan_adjoint(joined * whole.transitions, gradients)
        return to_owners(leaving, summary, feeding, call)

    return scan


def share(states: int, rank: int, world: int) -> slice:
    """Which of the B·H states a rank scans."""
    return slice(rank * states // world, (rank + 1) * states // world)


def to_heads(summary: Summary, sent: Places, call: LinearContext) -> Callable[[], Summary]:
    """Posts every rank's share of the ``sent`` segments; awaited, the whole chain of this rank's share of the states:
    ``[1, G, states, ...]``, 0 where a segment does not take part."""
    chain, me, ranks = call.chain, call.group.rank, range(call.group.size)
    batch, heads = summary.states.shape[0], summary.states.shape[2]
    mine = packed(summary, [call.own.index(place) for place in sent(chain, me)], call).flatten(1, 2)
    coming = [sent(chain, rank) for rank in ranks]
    own, numbers = share(batch * heads, me, call.group.size), width(summary, call)
    posted = _swap(
        call.group,
        [mine[:, share(batch * heads, rank, call.group.size)] for rank in ranks],
        [mine.new_empty(len(places), own.stop - own.start, numbers) for places in coming],
    )

    def arrive() -> Summary:
        chained = mine.new_zeros(len(chain), own.stop - own.start, numbers)
        for places, part in zip(coming, posted(), strict=True):
            rows_of(places).put(chained, part, 0)
        whole = unpacked(chained.unsqueeze(1), summary, call)
        if call.decay is None:
            return whole
        known = _stretch(summary, call).known(call.decay)
        return Summary(_by_state(known, summary, call), whole.states)

    return arrive


def to_owners(states: Tensor, summary: Summary, received: Places, call: LinearContext) -> Tensor:
    """Scanned states ``[1, G, states, K, V]`` to all states of this rank's segments ``[B, n, H, K, V]``, 0 for those
    that are not ``received``."""
    chain, me, ranks = call.chain, call.group.rank, range(call.group.size)
    like = torch.zeros_like(summary.states)
    count, places = like.shape[0] * like.shape[2], received(chain, me)
    shares = [share(count, rank, call.group.size) for rank in ranks]
    arrived = _swap(
        call.group,
        [rows_of(received(chain, rank)).take(states[0], 0) for rank in ranks],
        [states.new_empty(len(places), own.stop - own.start, *states.shape[3:]) for own in shares],
    )()
    if places:
        found = torch.cat(arrived, 1).unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)
        rows_of([call.own.index(place) for place in places]).put(like, found)
    return like


def _swap(group: Group, parts: Sequence[Tensor], buffers: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """All-to-all: ``parts[r]`` to rank r; awaited, what each rank sent, own part included."""
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


def _stretch(summary: Summary, call: LinearContext) -> Stretch:
    return stretch_of(call.plan, range(len(call.chain)), summary.states.device)


def _by_state(by_segment: Tensor, summary: Summary, call: LinearContext) -> Tensor:
    """``[B, G, 1 or H, 1, 1]`` to ``[1, G, states, 1, 1]``: this rank's share of the B·H states."""
    batch, heads = summary.states.shape[0], summary.states.shape[2]
    spread = by_segment.expand(batch, -1, heads, 1, 1).transpose(0, 1).flatten(1, 2)
    return spread[:, share(batch * heads, call.group.rank, call.group.size)].unsqueeze(0)


def volume(plan: SequencePlan, rank: int, sizes: LinearSizes) -> Volume:
    """Its summaries to the ranks that scan them, and what it scanned to the segments' owners; both ways."""
    chain, states = chain_of(plan), sizes.batch * sizes.heads
    others = [other for other in range(plan.world) if other != rank]
    shares = [share(states, other, plan.world) for other in range(plan.world)]
    counts = [own.stop - own.start for own in shares]

    def passed(there: Places, back: Places) -> tuple[int, int]:
        sent = [len(there(chain, rank)) * counts[other] for other in others]
        returned = [len(back(chain, other)) * counts[rank] for other in others]
        size = sum(sent) * sizes.summary // states + sum(returned) * sizes.state // states
        return size, sum(map(bool, sent)) + sum(map(bool, returned))

    (forward, messages), (backward, messages_back) = passed(feeding, fed), passed(fed, feeding)
    return Volume(forward, backward, messages, messages_back)


HEADWISE = LinearStrategy("headwise", enter, leave, "contiguous", causal_only, volume)
