"""What messages take where each needs those before it: counted by hand, and by bytes where a link is never idle."""

from dataclasses import dataclass

import pytest

from benchmarks.commands.link import predicted
from benchmarks.dependence import chained_seconds
from benchmarks.link import PASSES, busiest, bytes_between_nodes
from longctx.options import StrategyOptions
from longctx.verify import VerifyCase

RATE_MBIT = 8  # a byte is a microsecond
ROUTES = {
    "flat ring": ("ring", StrategyOptions()),
    "double ring": ("burst", StrategyOptions(inner_ring=2)),
    "USP": ("usp", StrategyOptions(ulysses_degree=2)),
}


@dataclass
class Event:
    phase: str
    id: int
    operation: str
    peers: tuple[int, ...]
    bytes: int = 0
    sequence: int = 0
    group: str = ""
    tag: int = 0


class Trace:
    """Of one rank, written as a program."""

    def __init__(self, rank: int) -> None:
        self.events: list[Event] = []
        self._rank, self._numbers = rank, {}

    def post(self, operation: str, peer: int, size: int = 0) -> Event:
        number = self._numbers.get((operation, peer), 0)
        self._numbers[operation, peer] = number + 1
        event = Event("post", 100 * self._rank + len(self.events), operation, (peer,), size, number)
        self.events.append(event)
        return event

    def wait(self, *posted: Event) -> None:
        self.events += [Event("wait", one.id, one.operation, one.peers) for one in posted]


def seconds(*traces: Trace, per_node: int = 1) -> float:
    return chained_seconds([trace.events for trace in traces], per_node, 1.0)


def test_both_ways_at_once_take_no_longer_than_one_and_an_answer_comes_after_what_it_answers():
    swapping, answering = [Trace(0), Trace(1)], [Trace(0), Trace(1)]
    for rank, trace in enumerate(swapping):
        trace.wait(trace.post("recv", 1 - rank), trace.post("send", 1 - rank, 5))
    asked, answered = answering
    asked.wait(asked.post("send", 1, 5), asked.post("recv", 1))
    answered.wait(answered.post("recv", 0))
    answered.wait(answered.post("send", 0, 3))
    assert seconds(*swapping) == pytest.approx(5)
    assert seconds(*answering) == pytest.approx(5 + 3)


def test_messages_of_two_ranks_share_a_link_and_those_inside_a_node_take_no_time():
    traces = [Trace(rank) for rank in range(4)]
    traces[0].wait(traces[0].post("send", 2, 4))
    traces[1].wait(traces[1].post("send", 3, 10))
    coming = traces[3].post("recv", 1)
    # What has come to rank 2 is passed on to 3, then back over the idle direction while 1 still sends.
    traces[2].wait(traces[2].post("recv", 0))
    traces[2].wait(traces[2].post("send", 3, 99))
    traces[3].wait(traces[3].post("recv", 2))
    traces[3].wait(coming)
    traces[2].wait(traces[2].post("send", 0, 1))
    traces[0].wait(traces[0].post("recv", 2))
    assert seconds(*traces, per_node=2) == pytest.approx(4 + 10)
    # Each rank its own node: from 4 on two share the way into rank 3, where 6 and then 93 are left.
    assert seconds(*traces, per_node=1) == pytest.approx(4 + 2 * 6 + 93 + 1)


def test_one_pair_sends_in_turn_and_a_message_waits_for_its_receiver():
    sender, receiver, other = (Trace(rank) for rank in range(3))
    first, second = sender.post("send", 1, 4), sender.post("send", 1, 6)
    sender.wait(first, second)
    coming = [receiver.post("recv", 0)]
    receiver.wait(receiver.post("recv", 2))
    coming.append(receiver.post("recv", 0))
    receiver.wait(*coming)
    other.wait(other.post("send", 1, 20))
    # 4 and 20 share the receiver's link until 8; the 16 left end at 24, and only then is the last asked for.
    assert seconds(sender, receiver, other) == pytest.approx(24 + 6)


def test_what_nobody_sends_is_a_mistake():
    waiting = Trace(0)
    waiting.wait(waiting.post("recv", 1))
    with pytest.raises(AssertionError, match="awaited"):
        seconds(waiting, Trace(1))


def case_of(route: str, causal: bool, layout: str = "zigzag") -> VerifyCase:
    strategy, options = ROUTES[route]
    return VerifyCase(
        strategy, layout, 4, seq=256, heads=8, kv_heads=8, head_dim=8, dtype="float32", causal=causal, options=options
    )


def busy(case: VerifyCase) -> list[float]:
    """Bytes on the busier direction over the rate."""
    closed = bytes_between_nodes(case, 2)
    return [busiest({edge: getattr(cost, name) for edge, cost in closed.items()}) / 1e6 for name in PASSES]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_without_a_mask_the_links_of_two_nodes_are_never_idle(route, layout):
    case = case_of(route, False, layout)
    assert predicted(case, RATE_MBIT) == pytest.approx(busy(case))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_no_mask_makes_it_less_than_bytes_over_rate(route, layout):
    case = case_of(route, True, layout)
    assert all(chained >= least * 0.999999 for chained, least in zip(predicted(case, RATE_MBIT), busy(case)))


def test_causal_blocks_that_cross_one_way_come_home_the_other_one_after_the_other():
    """Half as many rows cross to the first node as to the second; gradients of what the second read come back."""
    case, block = case_of("USP", True), 2 * 64 * 8 * 8 * 4 / 1e6  # of a rank
    assert predicted(case, RATE_MBIT) == pytest.approx([2 * block, 2 * block + 2 * block])
    assert busy(case) == pytest.approx([2 * block, 3 * block])
