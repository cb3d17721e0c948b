"""The replay of posts, waits and computing against late links: by hand, and on what strategies post."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as some

from benchmarks.late_link import Exposed, ExposedRatio, PassTimeline, in_order, judged
from benchmarks.waiting import Compute, Post, Wait, program_of, replay, wait_seconds
from longctx.comm import ExchangeEvent, exchange, group_of
from longctx.sim import Cluster
from longctx.verify import VerifyCase
from longctx.verify.run import core_of, local_inputs

LATE = 5.0


def spent(*programs, latency=LATE):
    return [(one.total, one.waited) for one in replay(programs, latency)]


def test_a_message_waits_for_the_word_of_its_receiver():
    send, receive = [Post(0, sends=(1,)), Wait(0)], [Post(0, receives=(0,)), Wait(0)]
    # The word leaves at 0, is there at 5; the message leaves, and arrives at 10.
    assert spent(send, receive) == [(5, 5), (10, 10)]
    # Posted early, the word is there before the message is ready: one latency is left, and the sender does not wait.
    assert spent([Compute(7), *send], receive) == [(7, 0), (12, 12)]
    # Posted late, the sender waits for the word.
    assert spent(send, [Compute(7), *receive]) == [(12, 12), (17, 10)]
    # What is computed between post and wait hides the latency.
    assert spent(send, [receive[0], Compute(4), Wait(0)]) == [(5, 5), (10, 6)]
    assert spent(send, [receive[0], Compute(40), Wait(0)]) == [(5, 5), (40, 0)]


def test_messages_of_one_pair_match_in_order_and_exchanges_go_on_when_all_is_there():
    first = [Post(7, sends=(1,)), Compute(1), Post(8, sends=(1, 2)), Wait(8), Wait(7)]
    second = [Post(0, receives=(0,)), Post(1, receives=(0,)), Wait(0), Wait(1)]
    third = [Compute(20), Post(0, receives=(0,)), Wait(0)]
    # Exchange 8 is done when rank 2 has said that it is ready, at 25; the message to rank 1 left at 5 all the same.
    assert spent(first, second, third) == [(25, 24), (10, 10), (30, 10)]


def test_ranks_that_wait_for_each_other_are_found():
    with pytest.raises(AssertionError, match="wait for each other"):
        replay([[Post(0, receives=(1,)), Wait(0)], [Post(0, receives=(0,)), Wait(0)]], LATE)


def chain(world, compute):
    """LASP's forward pass: a state goes from rank to rank; receives are posted before computing."""
    programs = []
    for rank in range(world):
        program = [] if rank == 0 else [Post(0, receives=(rank - 1,))]
        program += [Post(1, sends=(1,))] if rank == 0 else []
        program += [Compute(compute)]
        program += [] if rank == 0 else [Wait(0)]
        program += [Post(1, sends=(rank + 1,))] if 0 < rank < world - 1 else []
        program += [Wait(1)] if rank < world - 1 else []
        programs.append(program)
    return programs


def everyone(world, compute):
    """LASP-2's: every rank to all behind it."""
    return [
        [Post(0, tuple(range(rank + 1, world)), tuple(range(rank))), Compute(compute), Wait(0)] for rank in range(world)
    ]


@given(some.integers(2, 9), some.floats(0, 40))
def test_a_chain_waits_a_latency_a_rank_and_a_gather_two_in_all(world, compute):
    """The first hop's word is under way when the first state is ready; all others have long been there."""
    longest = max(one.waited for one in replay(chain(world, compute), LATE))
    # Each rank passes on when it has computed and received.
    arrived = 2 * LATE
    for _ in range(world - 2):
        arrived = max(arrived, compute) + LATE
    assert longest == pytest.approx(max(0.0, arrived - compute))
    gathered = max(one.waited for one in replay(everyone(world, compute), LATE))
    assert gathered == pytest.approx(max(0.0, 2 * LATE - compute))


@given(some.lists(some.floats(0, 9), min_size=2, max_size=5), some.floats(0, 9))
def test_an_exchange_of_all_with_all_ends_a_latency_after_the_last_and_two_after_oneself(computing, latency):
    ranks = set(range(len(computing)))
    programs = [
        [Compute(seconds), Post(0, tuple(ranks - {rank}), tuple(ranks - {rank})), Wait(0)]
        for rank, seconds in enumerate(computing)
    ]
    for one, seconds in zip(replay(programs, latency), computing, strict=True):
        assert one.total == pytest.approx(max(max(computing) + latency, seconds + 2 * latency))
        assert one.waited == pytest.approx(one.total - seconds)


def test_a_program_is_what_lies_between_the_lines_of_a_diary():
    timeline = [
        ExchangeEvent(True, 3, 1.0, 1.5, (1,), (2,)),
        ExchangeEvent(False, 3, 4.0, 9.0),
        ExchangeEvent(True, 4, 9.0, 9.25, (), (2,)),
    ]
    assert program_of(timeline, 0.5, 10.0) == [
        Compute(1.0), Post(3, (1,), (2,)), Compute(2.5), Wait(3), Compute(0.25), Post(4, (), (2,)), Compute(0.75),
    ]  # fmt: skip
    assert wait_seconds(timeline) == 5.0


def diaries(case):
    """Every rank's timeline of a pass forward and one backward, on sim, and the cluster's own traces of the two."""

    def run():
        plan, local, dout = local_inputs(case, dist.get_rank())
        compute, traffic = core_of(case, dist.group.WORLD), group_of(dist.group.WORLD).traffic
        traffic.timeline = forward = []
        out = compute(local, plan.handle)
        traffic.timeline = backward = []
        torch.autograd.grad(out, list(local.values()), dout)
        traffic.timeline = None
        return forward, backward

    cluster = Cluster(case.world)
    return cluster.run(run), cluster.trace


def case_of(strategy, world=4, mixer="retnet", seq=64):
    linear = strategy != "ring"
    return VerifyCase(
        strategy, "contiguous" if linear else "zigzag", world, seq=seq, heads=2, kv_heads=2, head_dim=4,
        mixer=mixer if linear else None, chunk=8 if linear else VerifyCase.chunk,
    )  # fmt: skip


ROUTES = [("lasp2", "retnet"), ("lasp", "gated_deltanet"), ("headwise", "simple_gla"), ("ring", None)]


@pytest.mark.parametrize("strategy, mixer", ROUTES)
def test_a_diary_holds_the_messages_that_sim_traces(strategy, mixer):
    """Every message of the trace, to and from whom, in the order in which its rank posted and awaited it."""
    kept, traces = diaries(case_of(strategy, mixer=mixer))
    for (forward, backward), events in zip(kept, traces, strict=True):
        timeline = forward + backward
        for operation, side in (("send", "sends"), ("recv", "receives")):
            traced = [event.peers for event in events if (event.phase, event.operation) == ("post", operation)]
            assert [(peer,) for moment in timeline for peer in getattr(moment, side)] == traced
        posts = {moment.number: moment for moment in timeline if moment.posted}
        awaited = [
            len(posts[moment.number].sends + posts[moment.number].receives) for moment in timeline if not moment.posted
        ]
        assert sum(awaited) == sum(event.phase == "wait" and event.operation in ("send", "recv") for event in events)
        numbers = [moment.number for moment in timeline if not moment.posted]
        assert sorted(numbers) == sorted(posts) and all(moment.ended >= moment.started for moment in timeline)


def bare(timeline):
    """Without computing: what is left is latency."""
    return [step for step in program_of(timeline, 0.0, 0.0) if not isinstance(step, Compute)]


def bare_waiting(strategy, world):
    kept, _ = diaries(case_of(strategy, world))
    return [max(one.waited for one in replay([bare(both[number]) for both in kept], 1.0)) for number in range(2)]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_latencies_that_are_exposed_when_nothing_is_computed(world):
    """LASP-2: the word and the message. LASP: the word and a message a rank. Ring: both, every hop."""
    assert bare_waiting("lasp2", world) == [2, 2]
    assert bare_waiting("lasp", world) == [world, world]
    forward, backward = bare_waiting("ring", world)
    assert forward == 2 * (world - 1) and backward > forward


def test_nobody_keeps_a_diary_unasked_and_empty_exchanges_are_not_in_it():
    def run():
        group, other = group_of(dist.group.WORLD), 1 - dist.get_rank()
        one = torch.ones(2)
        exchange(group, [(other, one)], [(other, torch.empty(2))]).wait()
        assert group.traffic.timeline is None
        group.traffic.timeline = []
        exchange(group, [(other, one[:0])], [(other, torch.empty(0))]).wait()
        assert group.traffic.timeline == []
        exchange(group, [(other, one)], [(other, torch.empty(2))]).wait()
        return group.traffic.timeline

    for rank, (posted, awaited) in enumerate(Cluster(2).run(run)):
        assert (posted.posted, posted.sends, posted.receives) == (True, (1 - rank,), (1 - rank,))
        assert (awaited.posted, awaited.number) == (False, posted.number)


def late_case():
    """Two ranks, two repeats: rank 1 waits 12 (then 14) for a message that the replay has at 10, then nothing."""

    def seen(timeline, ended):
        return PassTimeline(0.0, ended, tuple(timeline))

    send = [ExchangeEvent(True, 0, 0.0, 0.0, (1,)), ExchangeEvent(False, 0, 0.0, 5.0)]
    quiet = seen([], 1.0)
    late = [[ExchangeEvent(True, 0, 0.0, 0.0, (), (0,)), ExchangeEvent(False, 0, 0.0, ended)] for ended in (12.0, 14.0)]
    return [
        [[seen(send, 5.0), quiet], [seen(send, 5.0), quiet]],
        [[seen(late[0], 12.0), quiet], [seen(late[1], 14.0), quiet]],
    ]


def test_waits_are_judged_by_the_rank_that_waits_longest():
    found = judged(late_case(), 5.0)
    assert found == {"forward": Exposed((12.0, 14.0), (10.0, 10.0)), "backward": Exposed((0.0, 0.0), (0.0, 0.0))}
    assert found["forward"] + found["forward"] == Exposed((24.0, 28.0), (20.0, 20.0))


def test_ratios_are_paired_and_close_within_a_fifth():
    one, other = Exposed((10.0, 20.0, 10.0), (8.0, 8.0, 8.0)), Exposed((30.0, 40.0, 22.0), (16.0, 16.0, 16.0))
    ratio = ExposedRatio.of(other, one)
    assert (ratio.measured.median, ratio.predicted.median) == (2.2, 2.0)
    assert ratio.close and ratio.deviation == pytest.approx(0.1)
    assert not ExposedRatio.of(other, Exposed((10.0, 10.0, 10.0), (8.0, 8.0, 8.0))).close
    assert in_order([one, other]) and not in_order([other, one])
