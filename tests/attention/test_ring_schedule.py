"""The ring's schedule: what is in flight when, that no order of hand-overs matters, and that faults are noticed."""

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster, DeadlockError, Event, Fault, MismatchError, RankFailed
from longctx.verify import VerifyCase, judge, run_rank

WORLD = 4
LAYOUTS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}


def attend(plan: SequencePlan, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    q, k, v, dout = (
        torch.randn(1, plan.shard, n, 8, generator=generator).to(dtype).requires_grad_() for n in (4, 2, 2, 4)
    )
    out = StrategyAttention("ring", dist.group.WORLD)(q, k, v, plan.handle)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.detach())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_order_of_hand_overs_changes_a_bit(layout, dtype):
    documents = [Documents.from_lengths((20, 1, 40))]
    plan = SequencePlan(documents, Mask(window=30), LAYOUTS[layout], 67, WORLD)
    expected = Cluster(WORLD).run(attend, plan, dtype)
    for seed in (None, 0, 1, 2, 3):
        for mine, right in zip(Cluster(WORLD, seed=seed).run(attend, plan, dtype), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


CASE = VerifyCase("ring", "zigzag", WORLD, seq=64, heads=4, kv_heads=2, head_dim=8)


def judged(*faults: Fault):
    cluster = Cluster(WORLD, faults=faults)
    verdict, _ = judge(CASE, cluster.run(lambda: run_rank(CASE, dist.group.WORLD)))
    assert cluster.fired == list(faults)
    return verdict


def sends_of(rank: int) -> list[Event]:
    cluster = Cluster(WORLD)
    cluster.run(lambda: run_rank(CASE, dist.group.WORLD))
    return [event for event in cluster.trace[rank] if (event.phase, event.operation) == ("post", "send")]


def test_a_delayed_message_changes_nothing():
    assert judged() == judged(Fault("delay", rank=1, operation="send", turns=25))
    assert judged().passed


@pytest.mark.parametrize("occurrence", range(3))
@pytest.mark.parametrize("bit", [-2, 40])
def test_a_corrupted_block_of_keys_is_noticed(occurrence, bit):
    """A flipped exponent, and a relative error of 2^-12 in one number."""
    verdict = judged(Fault("corrupt", rank=2, operation="send", occurrence=occurrence, bit=bit))
    assert not verdict.passed


def test_every_message_of_a_rank_matters():
    sends = sends_of(1)
    assert len(sends) > 6
    for occurrence in range(len(sends)):
        assert not judged(Fault("corrupt", rank=1, operation="send", occurrence=occurrence, bit=45)).passed


def test_a_lost_message_is_a_report_and_no_hang():
    """Later messages to the same rank take the lost one's place: their sizes differ, or the last one is missing."""
    for occurrence, send in enumerate(sends := sends_of(1)):
        with pytest.raises((DeadlockError, RankFailed)) as caught:
            judged(Fault("drop", rank=1, operation="send", occurrence=occurrence))
        [receiver] = send.peers
        if send.peers not in [later.peers for later in sends[occurrence + 1 :]]:
            assert isinstance(caught.value, DeadlockError)
        if isinstance(caught.value, DeadlockError):
            [line] = [line for line in str(caught.value).splitlines() if f"rank {receiver}: recv" in line]
            assert "float64 from rank 1" in line and "longctx/comm/exchange.py" in line
        else:
            assert isinstance(caught.value.__cause__, MismatchError) and caught.value.rank == receiver
