"""What is in flight while linear layers compute: exchanges are posted before local work and awaited after it."""

import pytest
import torch
import torch.distributed as dist

from longctx.linear import LinearAttention
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Zigzag
from longctx.sim import Cluster, Event

WORLD, CHUNK = 4, 8
LAYOUTS = {"contiguous": Contiguous(), "zigzag": Zigzag()}


def attend(plan: SequencePlan, strategy: str, with_backward: bool) -> None:
    shape = (1, plan.shard, 2)
    q, k, v, dout = (torch.randn(*shape, 4).requires_grad_() for _ in range(4))
    log_decay = -torch.rand(*shape)
    out = LinearAttention(strategy, dist.group.WORLD, CHUNK).attend(q, k, v, plan.handle, log_decay)
    if with_backward:
        torch.autograd.grad(out, (q, k, v), dout.detach())


def traced(strategy: str, layout: str, with_backward: bool) -> list[list[Event]]:
    plan = SequencePlan([Documents.single(64)], Mask(), LAYOUTS[layout], 64, WORLD)
    cluster = Cluster(WORLD, trace_compute=True)
    cluster.run(attend, plan, strategy, with_backward)
    return cluster.trace


def places(events: list[Event], *operations: str) -> list[int]:
    return [place for place, event in enumerate(events) if event.operation in operations]


def transfers(events: list[Event]) -> list[tuple[int, int]]:
    """(post, wait) of each message."""
    waits = {event.id: place for place, event in enumerate(events) if event.phase == "wait"}
    return [(place, waits[event.id]) for place, event in enumerate(events) if event.phase == "post"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lasp2_posts_before_and_awaits_after_what_chunks_read_of_themselves(layout):
    """Forward: the scores and their product lie between; three products of chunks in all."""
    for rank, events in enumerate(traced("lasp2", layout, False)):
        products = places(events, "aten.bmm", "aten.mm")
        for post, wait in transfers(events):
            hidden = [at for at in products if post < at < wait]
            assert len(hidden) == 2, f"rank {rank}: scores and their values"
            assert any(at > wait for at in products), "what the states add comes after"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lasp2_hides_the_backward_exchange_behind_most_gradients(layout):
    forward = [len(transfers(events)) for events in traced("lasp2", layout, False)]
    for rank, events in enumerate(traced("lasp2", layout, True)):
        products = places(events, "aten.bmm", "aten.mm")
        backward = transfers(events)[forward[rank] :]
        assert backward
        for post, wait in backward:
            hidden = [at for at in products if post < at < wait]
            assert len(hidden) >= 8, f"rank {rank}: chunks again, and gradients of what they read"


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_waits_before_it_has_computed(strategy, layout):
    """The first wait of a pass comes after what chunks read of themselves, whatever the strategy."""
    for events in traced(strategy, layout, False):
        waits = [place for place, event in enumerate(events) if event.phase == "wait"]
        products = places(events, "aten.bmm", "aten.mm")
        assert not waits or sum(at < waits[0] for at in products) >= 3


def test_the_first_rank_of_lasp_sends_before_it_computes():
    events = traced("lasp", "contiguous", False)[0]
    [(post, _)] = transfers(events)
    products = places(events, "aten.bmm", "aten.mm")
    assert sum(at < post for at in products) < sum(at > post for at in products)
