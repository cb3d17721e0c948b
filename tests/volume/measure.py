"""What a strategy really sends, forward and backward, by rank; and all that the tests of strategies ask them for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from longctx.attention import AttentionCase, StrategyAttention, get_strategy, refusal
from longctx.attention.operator import DEFAULT, Options
from longctx.attention.registry import Sizes, Volume, divisors
from longctx.comm import group_of
from longctx.sequence import Contiguous, Documents, Layout, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster, mark_step

DIM = 4
BYTES = {torch.float64: (8, 8), torch.float32: (4, 4), torch.bfloat16: (2, 4)}  # of a number, of an accumulator
LAYOUTS: dict[str, Layout] = {
    "contiguous": Contiguous(),
    "zigzag": Zigzag(),
    "striped": Striped(),
    "striped4": Striped(4),
}
PACKINGS = {
    "one": [(96,)],
    "edges": [(24, 24, 48)],
    "mixed": [(47, 1, 1, 30, 17), (1,) * 20 + (50,)],
    "padded": [(10, 35), (), (65, 3)],
}
MASKS = {"causal": Mask(), "full": Mask(False), "window": Mask(window=15), "window full": Mask(False, 15)}
FORWARD, BACKWARD = 1, 2  # steps of a trace


def plan_of(packing, mask: Mask, layout: Layout, length: int, world: int) -> SequencePlan:
    return SequencePlan([Documents.from_lengths(row) for row in packing], mask, layout, length, world)


def choices(strategy: str, case: AttentionCase) -> Iterator[tuple[int, Options]]:
    """Every (inner, options) that the strategy tells apart and takes for a case; none where it refuses the case."""
    found = get_strategy(strategy)
    inners = divisors(case.world) if "inner" in found.takes else [None]
    sides = ("keys", "queries") if "backward" in found.takes else ("auto",)
    travels = ("wide", "narrow") if "travel" in found.takes else ("wide",)
    for inner, side, travel in itertools.product(inners, sides, travels):
        options = Options(side, travel)
        asked = AttentionCase(
            case.world, case.heads, case.kv_heads, case.layout, case.mask, inner, options, case.documents
        )
        if refusal(found, asked) is None:
            yield inner or (1 if found.inner is None else case.world), options


def attend(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: Options = DEFAULT,
) -> tuple[list[torch.Tensor], Volume]:
    """The calling rank's (out, dq, dk, dv), and what it counted as sent."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    q_heads, kv_heads = heads
    q, k, v, dout = (
        torch.randn(len(plan.documents), plan.shard, n, DIM, generator=generator).to(dtype).requires_grad_()
        for n in (q_heads, kv_heads, kv_heads, q_heads)
    )
    attention = StrategyAttention(strategy, dist.group.WORLD, inner=inner, options=options)
    traffic = group_of(dist.group.WORLD).traffic
    mark_step(FORWARD)
    out = attention(q, k, v, plan.handle)
    forward = traffic.bytes, traffic.messages
    mark_step(BACKWARD)
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    sent = Volume(forward[0], traffic.bytes - forward[0], forward[1], traffic.messages - forward[1])
    return [out.detach(), *grads], sent


def measured(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: Options = DEFAULT,
    cluster: Cluster | None = None,
) -> list[Volume]:
    """By rank. What comm counts, what the trace of sim shows step by step, and its ledger are one."""
    cluster = cluster or Cluster(plan.world)
    counted = [sent for _, sent in cluster.run(attend, strategy, plan, heads, dtype, inner, options)]
    for rank, sent in enumerate(counted):
        posts = [event for event in cluster.trace[rank] if (event.phase, event.operation) == ("post", "send")]
        steps = [[event.bytes for event in posts if event.step == step] for step in (FORWARD, BACKWARD)]
        assert sent == Volume(*map(sum, steps), *map(len, steps)), f"rank {rank}"
        assert sent.forward + sent.backward == cluster.ledger.sent(rank), f"rank {rank}"
    return counted


def sizes_of(
    plan: SequencePlan, heads: tuple[int, int], dtype: torch.dtype, inner: int = 1, options: Options = DEFAULT
) -> Sizes:
    return Sizes(len(plan.documents), *heads, DIM, *BYTES[dtype], inner, options)


def closed(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: Options = DEFAULT,
) -> list[Volume]:
    """What the strategy says that it sends, by rank."""
    sizes = sizes_of(plan, heads, dtype, inner, options)
    return [get_strategy(strategy).volume(plan, rank, sizes) for rank in range(plan.world)]


def assert_volume(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: Options = DEFAULT,
) -> list[Volume]:
    """The closed form is what was sent; returns it by rank."""
    volumes = closed(strategy, plan, heads, dtype, inner, options)
    assert volumes == measured(strategy, plan, heads, dtype, inner, options)
    return volumes
