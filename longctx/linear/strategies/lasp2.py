"""LASP-2: one gather of the segments' states in each direction, computed around.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (2025).

    summarize my segments                          what each segment owes the state that entered it
    start gathering all summaries (A, B)           start gathering them, with the A's
    O = what chunks read of themselves             gradients of what does not wait for others
    scan the chain up to my segments: S_in         scan the chain back to my segments: D_out
    O += Q S_in                                    gradients of my summaries

Unlike there, a rank sends a summary only to ranks whose segments a document reaches from it: without documents half of
what an all-gather sends, as an early rank needs nothing of a later one in the forward pass and a late one nothing of
an earlier in the backward pass. A state's size does not depend on the length, so neither do the bytes of contiguous
and zigzag shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from longctx.attention.costs.estimate import Volume
from longctx.comm import exchange
from longctx.linear.affine import affine_exscan, affine_exscan_adjoint
from longctx.linear.bidirectional import total_volume
from longctx.linear.mixer import get_mixer
from longctx.linear.registry import LinearCase, LinearSizes, LinearStrategy
from longctx.linear.segments import chain_of
from longctx.linear.states import Arriving, LinearContext, Stretch, Summary, packed, stretch_of, unpacked, width
from longctx.sequence import SequencePlan


def enter(summary: Summary, call: LinearContext) -> Arriving:
    """Sends summaries to the ranks that read them; S_in of this rank's segments."""
    chain, me = call.chain, call.group.rank
    arriving = gather(summary, call, chain.sent)

    def scan() -> Tensor:
        stretch, chained = arriving()
        entering, _ = affine_exscan(stretch.onward * chained.transitions, stretch.onward * chained.states)
        return stretch.rows(chain.own(me)).take(entering).clone()  # or all states of the chain would be kept

    return scan


def leave(summary: Summary, call: LinearContext) -> Arriving:
    """Sends gradients of S_in to the ranks whose summaries are in it; D_out of this rank's segments."""
    chain, me = call.chain, call.group.rank
    arriving = gather(summary, call, chain.returned)

    def scan() -> Tensor:
        stretch, chained = arriving()
        gradients = stretch.joined * chained.states
        leaving, _ = affine_exscan_adjoint(stretch.joined * chained.transitions, gradients)
        return stretch.rows(chain.own(me)).take(leaving)

    return scan


def gather(
    summary: Summary, call: LinearContext, sent: Callable[[int, int], tuple[int, ...]]
) -> Callable[[], tuple[Stretch, Summary]]:
    """Posts the exchange; awaited, everything that ``sent(sender, receiver)`` brings here beside what is here."""
    chain, me, others = call.chain, call.group.rank, call.group.others
    own, coming = chain.own(me), {other: sent(other, me) for other in others}
    like, batch, heads = summary.states, *summary.states.shape[0:3:2]
    buffers = [like.new_empty(len(coming[other]), batch, heads, width(summary, call)) for other in others]
    posted = exchange(
        call.group,
        [(other, packed(summary, [own.index(place) for place in sent(me, other)], call)) for other in others],
        list(zip(others, buffers, strict=True)),
    )

    def arrive() -> tuple[Stretch, Summary]:
        stretch = stretch_of(call.plan, sorted({*own, *(p for places in coming.values() for p in places)}), like.device)
        parts = [(own, summary)]
        for other, message in zip(others, posted.wait(), strict=True):
            parts.append((coming[other], unpacked(message, summary, call)))
        states = _in_order(stretch, [(places, part.states) for places, part in parts])
        if call.decay is not None:
            return stretch, Summary(stretch.known(call.decay), states)
        return stretch, Summary(_in_order(stretch, [(places, part.transitions) for places, part in parts]), states)

    return arrive


def _in_order(stretch: Stretch, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Segments from here and there, ``[B, n, ...]`` each, as one stretch of the chain."""
    first = parts[0][1]
    whole = first.new_empty(first.shape[0], len(stretch.places), *first.shape[2:])
    for places, part in parts:
        stretch.rows(places).put(whole, part)
    return whole


def volume(plan: SequencePlan, rank: int, sizes: LinearSizes) -> Volume:
    """Summaries to later ranks that read them, and with gradients in place of additions to earlier ones."""
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
