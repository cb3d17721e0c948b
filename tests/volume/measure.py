"""What a strategy really sends, forward and backward, by rank: bytes of the ledger of sim, messages of comm."""

from __future__ import annotations

import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention, get_strategy
from longctx.attention.operator import DEFAULT, Options
from longctx.attention.registry import Sizes, Volume
from longctx.comm import group_of
from longctx.sequence import SequencePlan
from longctx.sim import Cluster

DIM = 4
BYTES = {torch.float64: (8, 8), torch.float32: (4, 4), torch.bfloat16: (2, 4)}  # of a number, of its gradient


def measured(
    strategy: str, plan: SequencePlan, heads: tuple[int, int], dtype: torch.dtype, options: Options = DEFAULT
) -> list[Volume]:
    batch, ranks = len(plan.documents), range(plan.world)

    def run(with_backward: bool) -> tuple[int, int]:
        counts = (heads[0], heads[1], heads[1])
        q, k, v = (torch.randn(batch, plan.shard, n, DIM).to(dtype).requires_grad_() for n in counts)
        out = StrategyAttention(strategy, dist.group.WORLD, options=options)(q, k, v, plan.handle)
        if with_backward:
            out.backward(torch.randn_like(out))
        traffic = group_of(dist.group.WORLD).traffic
        return traffic.bytes, traffic.messages

    cluster, passes = Cluster(plan.world, trace=False), []
    for with_backward in (False, True):
        counted = cluster.run(run, with_backward)
        assert [sent for sent, _ in counted] == [cluster.ledger.sent(rank) for rank in ranks]
        passes.append(counted)
    return [
        Volume(forward, both - forward, messages, all_messages - messages)
        for (forward, messages), (both, all_messages) in zip(*passes, strict=True)
    ]


def closed(
    strategy: str, plan: SequencePlan, heads: tuple[int, int], dtype: torch.dtype, options: Options = DEFAULT
) -> list[Volume]:
    """What the strategy says that it sends."""
    sizes = Sizes(len(plan.documents), *heads, DIM, *BYTES[dtype], options=options)
    return [get_strategy(strategy).volume(plan, rank, sizes) for rank in range(plan.world)]
